"""Near-duplicates across the split: found, told, and left out on the side that is asked for."""

import json
import random
from pathlib import Path

import pytest

from gen.corpus.documents import CorpusConfig, build_documents, is_held_out, load_split
from gen.corpus.near_duplicates import find, shingles

WORDS = [f"word{number}" for number in range(500)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """40 random texts and, for two held-out ones, a copy with one word changed in training."""
    generator = random.Random(0)
    texts = {f"d{n}": " ".join(generator.choices(WORDS, k=200)) for n in range(40)}
    held_out = [name for name in texts if is_held_out(name, 0.3)][:2]
    spare = (name for n in range(1000) if not is_held_out(name := f"copy{n}", 0.3))
    for name in held_out:
        words = texts[name].split()
        words[100] = "changed"
        texts[next(spare)] = " ".join(words)
    rows = [json.dumps({"id": name, "text": text}) for name, text in texts.items()]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows))
    return tmp_path


@pytest.mark.parametrize(
    ("action", "share", "training", "held_out"),
    [("report", 2, 0, 0), ("drop", 0, -2, 0), ("keep_in_training", 0, 0, -2)],
)
def test_near_duplicates_are_left_out_where_it_is_asked(
    corpus: Path, action: str, share: int, training: int, held_out: int
) -> None:
    config = CorpusConfig(
        "jsonl", str(corpus / "texts.jsonl"), id_column="id", held_out=0.3, near_duplicates=action
    )
    manifest = build_documents(config, corpus)
    found = manifest["near_duplicates"]
    assert (found["held_out"], found["training"]) == (2, 2)
    assert found["share"] == share / manifest["counts"]["val"]
    train, val = (list(load_split(corpus, split)) for split in ("train", "val"))
    assert len(train) == manifest["counts"]["train"] + training
    assert len(val) == manifest["counts"]["val"] + held_out
    kept = {document.id for document in train}
    assert any(name.startswith("copy") for name in kept) is (action != "drop")
    assert build_documents(config, corpus) == manifest


def test_signs_without_spaces_make_shingles_too() -> None:
    assert shingles("数学は楽しい") == {"数 学 は 楽 し", "学 は 楽 し い"}
    assert shingles("Two words") == {"two words"}
    assert shingles("") == {""}


def test_a_split_that_would_be_empty_is_refused(corpus: Path) -> None:
    class Same:
        id, text = "a", "one two three four five six"

    with pytest.raises(ValueError, match="would leave no held-out document"):
        find([Same()], [Same()], "keep_in_training")
    assert find([Same()], [Same()], "report").share == 1.0
