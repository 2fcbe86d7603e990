"""Near-duplicates across the split: found, told, and left out on the side that is asked for."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen.corpus.documents import CorpusConfig, Document, build_documents, is_held_out, load_split
from gen.corpus.near_duplicates import Shingles, find, shingles

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


def as_said(text: str) -> set[str]:
    """What the hashes stand for: runs of five words."""
    sign = r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
    found = re.findall(rf"{sign}|(?:(?!{sign})\w)+", text.lower())
    found = found or [str(b"".join(text.lower().encode().split()))]
    return {" ".join(found[at : at + 5]) for at in range(max(1, len(found) - 4))}


TEXTS = st.lists(
    st.sampled_from(
        ["a", "b", "Ab", "ba", "a_1", ",", "  ", "\n", "é", "É", "—", "“x”", "数", "学1", "ß"]
    ),
    max_size=30,
).map(" ".join) | st.text(max_size=60)


@given(TEXTS, TEXTS)
def test_hashes_are_equal_where_runs_of_words_are(one: str, other: str) -> None:
    mine, theirs = shingles(one), shingles(other)
    assert len(mine) == len(as_said(one))
    assert len(np.intersect1d(mine, theirs)) == len(as_said(one) & as_said(other))


def test_texts_of_signs_alone_are_duplicates_where_they_are_the_same() -> None:
    documents = [Document(str(place), text) for place, text in enumerate(["* * *", "====", "🙂"])]
    found = find(documents, [Document("a", "***"), Document("b", "....")], "report")
    assert (found.held_out, found.training) == ({"a"}, {"0"})


def test_the_table_of_hashes_forgets_none_and_knows_few_others() -> None:
    hashes = np.random.default_rng(0).integers(1 << 64, size=(2, 50_000), dtype=np.uint64)
    table = Shingles([hashes[0, :20_000], hashes[0, 20_000:]])
    assert table.count(hashes[0]) == 50_000
    assert table.count(hashes[1]) < 0.08 * 50_000


def test_a_split_that_would_be_empty_is_refused(corpus: Path) -> None:
    class Same:
        id, text = "a", "one two three four five six"

    with pytest.raises(ValueError, match="would leave no held-out document"):
        find([Same()], [Same()], "keep_in_training")
    assert find([Same()], [Same()], "report").share == 1.0
