"""Streams of several styles: what lies in their shards, and the loss of each style."""

from pathlib import Path
from typing import Any

import pytest
from streaming import LocalDataset

from gen.corpus.documents import Document
from gen.corpus.tokenizer import TokenizerConfig, build_tokenizer
from gen.generations.store import Generation, GenerationStore
from gen.megadocs.config import StreamConfig
from gen.megadocs.streams import build_stream
from gen.quality.gates import QualityConfig
from trainer.config.schema import DataConfig, Mask
from trainer.data.mds import MegadocStream
from trainer.evaluation.losses import Scores, evaluation_batches

STYLES = ["faq", "table"]
DOCUMENTS = [Document(f"d{i}", f"This is document number {i}. " * (i + 1)) for i in range(40)]


def generation(document: str, method: str, index: int, text: str) -> Generation:
    return Generation(
        document, method, index, text, "m", "v", 1.0, 1.0, 9, 0, "stop", 1, 1, 0, False
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two generations a document in each of two stores."""
    for method in STYLES:
        store = GenerationStore.of_method(tmp_path, method, 2)
        store.claim({})
        rows = [
            generation(document.id, method, index, f"{method} {index} of {document.id}")
            for document in DOCUMENTS
            for index in range(2)
        ]
        store.append(rows, 0)
    build_tokenizer(TokenizerConfig(vocab_size=320), tmp_path, [d.text for d in DOCUMENTS])
    return tmp_path


def build(root: Path, kind: str, config: StreamConfig, generations: int = 1) -> dict[str, Any]:
    tokenizer, vocabulary = build_tokenizer(TokenizerConfig(vocab_size=320), root, [])
    return build_stream(
        *(kind, "rephrase", generations, DOCUMENTS, "h", tokenizer, vocabulary, config),
        *(QualityConfig(), root),
    )


@pytest.mark.parametrize("kind", ["simple", "stitched"])
def test_every_member_tells_its_style(root: Path, kind: str) -> None:
    manifest = build(root, kind, StreamConfig(methods=STYLES), generations=2)
    assert manifest["name"] == f"{kind}-g4-faq+table"
    assert (manifest["generations"], manifest["styles"]) == (4, STYLES)
    tokenizer, _ = build_tokenizer(TokenizerConfig(vocab_size=320), root, [])
    dataset = LocalDataset(str(root / "streams" / manifest["name"]))
    assert len(dataset) == len(DOCUMENTS) * (5 if kind == "simple" else 1)
    for number in range(len(dataset)):
        sample = dataset[number]
        starts = [0, *sample["member_ends"][:-1]]
        for place, (kind_of, index, style) in enumerate(sample["provenance"]["members"]):
            mark = sample["member_styles"][place]
            assert style == (STYLES[mark - 1] if kind_of else None)
            tokens = sample["tokens"][starts[place] : sample["member_ends"][place] - 1]
            text = tokenizer.decode(tokens.tolist())
            if style:
                assert text.startswith(f"{style} {index} of {sample['provenance']['document_id']}")


def test_a_share_of_the_documents_takes_a_style(root: Path) -> None:
    def takers(share: float) -> set[str]:
        manifest = build(root, "stitched", StreamConfig(methods=STYLES, shares=[1.0, share]))
        dataset = LocalDataset(str(root / "streams" / manifest["name"]))
        samples = [dataset[number] for number in range(len(dataset))]
        assert all(1 in sample["member_styles"] for sample in samples)
        return {sample["id"] for sample in samples if 2 in sample["member_styles"]}

    assert takers(0.0) == set()
    few, many = takers(0.3), takers(0.7)
    assert 0 < len(few) < len(many) < len(DOCUMENTS)
    assert few < many
    assert len(takers(1.0)) == len(DOCUMENTS)


def test_loss_by_style_is_that_of_its_tokens(root: Path) -> None:
    """With a loss that is known for every place of every document."""
    manifest = build(root, "stitched", StreamConfig(methods=STYLES))
    stream = MegadocStream(root / "streams" / manifest["name"])
    data = DataConfig(context_length=64, mask=Mask.megadoc)
    scores = Scores(stream)
    for batch, _ in evaluation_batches(stream, data):
        losses = 1 + batch.target_positions.double() + 100 * batch.target_documents.double()
        scores.add(batch, losses)
    for place, style in enumerate(STYLES):
        summed = count = 0.0
        for number in range(len(stream)):
            sample = stream[number]
            start = [0, *sample.member_ends][place]
            # The first token of a window has no target: the document's first, and each 65th.
            places = [p for p in range(start, sample.member_ends[place]) if p % 64]
            summed += sum(1 + p + 100 * number for p in places)
            count += len(places)
        assert scores.loss_by_style[style] == pytest.approx(summed / count)
    assert scores.to_dict()["loss_by_style"] == scores.loss_by_style
    assert scores.style_tokens.sum() == scores.document_tokens.sum()


def test_one_style_is_stored_as_before(root: Path) -> None:
    manifest = build(root, "stitched", StreamConfig(methods=["faq"]))
    assert manifest["name"] == "stitched-g1-faq"
    assert manifest["styles"] == []
    dataset = LocalDataset(str(root / "streams" / manifest["name"]))
    assert "member_styles" not in dataset[0]
    assert dataset[0]["provenance"]["members"] == [[1, 0], [0, 0]]


def test_impossible_choices(root: Path) -> None:
    for config, message in (
        (StreamConfig(methods=["faq", "faq"]), "names a method twice"),
        (StreamConfig(methods=STYLES, shares=[1.0]), "one share for each"),
        (StreamConfig(methods=STYLES, shares=[1.0, 1.5]), r"must all be in \[0, 1\]"),
        (StreamConfig(member_order="sorted"), "is not one of methods, random"),
        (StreamConfig(methods=["faq", "maths"]), "maths holds no generations"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            build(root, "stitched", config)
