"""Samples do not change: every one of many streams is what earlier versions wrote, byte for byte.

``golden_samples.json`` holds a hash of the raw samples of each stream and of its counts. It was
written by the version that tokenized every text again for every stream; a change that means to
change samples writes it anew with ``python -m tests.gen.megadocs.test_golden_samples`` and says so.
"""

import hashlib
import json
import sys
import tempfile
from dataclasses import dataclass, field
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
from tests.gen.megadocs.test_encoding import TEXTS, TOKENIZERS

GOLDEN = Path(__file__).with_name("golden_samples.json")
LONGER = [" ".join((TEXTS * 7)[place : place + 9]) for place in range(9)]
DOCUMENTS = [Document(f"doc/{n} “é”", text) for n, text in enumerate([*TEXTS, *LONGER])]
HELD_OUT = [Document(f"held{n}", text[::-1]) for n, text in enumerate(LONGER[:4])]
COUNTS = {"rephrase": 4, "faq": 2, "latent-g2": 2, "latent-g3": 3}
SILENT = ("doc/6 “é”", 1)  # this generation of each store was never made
PREAMBLE = "Here is a rephrased version of the text:\n\n"
STRIP = QualityConfig(preamble="strip", duplicate="drop")


@dataclass(frozen=True)
class Stream:
    """What one stream of the set is asked for with."""

    kind: str
    generations: int = 0
    method: str = "rephrase"
    quality: QualityConfig = field(default_factory=QualityConfig)
    options: dict[str, Any] = field(default_factory=dict)


STREAMS = {
    "real": Stream("real"),
    "val": Stream("val"),
    "simple-1": Stream("simple", 1),
    "simple-4": Stream("simple", 4),
    "simple-4-seed": Stream("simple", 4, options={"shuffle_seed": 7, "shard_bytes": 4096}),
    "simple-4-strip": Stream("simple", 4, quality=STRIP),
    "simple-3-absent": Stream("simple", 3, options={"real_document": "absent"}),
    "stitched-1": Stream("stitched", 1),
    "stitched-4": Stream("stitched", 4),
    "stitched-4-text": Stream("stitched", 4, options={"separator": "\n---\n"}),
    "stitched-4-special": Stream("stitched", 4, options={"separator": "</s>"}),
    "stitched-4-strip": Stream("stitched", 4, quality=STRIP, options={"separator": " "}),
    "stitched-3-first": Stream(
        "stitched", 3, options={"real_document": "first", "separator": "\n\n"}
    ),
    "stitched-2-absent": Stream("stitched", 2, options={"real_document": "absent"}),
    "stitched-styles": Stream(
        "stitched",
        2,
        options={"methods": ["faq", "rephrase"], "shares": [0.5, 1.0], "shard_bytes": 8192},
    ),
    "stitched-random": Stream(
        "stitched",
        2,
        options={"methods": ["faq", "rephrase"], "member_order": "random", "separator": "\n"},
    ),
    "simple-styles": Stream("simple", 2, options={"methods": ["rephrase", "faq"]}),
    "latent-2": Stream("latent", 2, "latent"),
    "latent-3": Stream(
        "latent", 3, "latent", options={"open_thought": "<t>", "close_thought": "</s>"}
    ),
    "latent-3-strip": Stream("latent", 3, "latent", quality=STRIP),
}


def generations_of(store: str, count: int) -> list[Generation]:
    """Texts of many kinds: some with a preamble, some alike, one missing."""
    rows = []
    for number, document in enumerate(DOCUMENTS):
        for index in range(count):
            text = f"{store} {index}: {document.text[:: -1 - index]} {document.text[index * 5 :]}"
            if (number + index) % 5 == 0:
                text = PREAMBLE + text
            if number == 3:
                text = " Nearly the same text, as siblings are that a model repeats. " * 3
            if (document.id, index) != SILENT:
                rows.append(
                    Generation(
                        *(document.id, store, index, text, "m", "v", 1.0, 1.0, 9, 0, "stop"),
                        *(1, 1, 0, False, document.text_hash, 1.5 + index),
                    )
                )
    return rows


def fill(root: Path) -> None:
    """The stores of the set, each in several parts and in no order."""
    for name, count in COUNTS.items():
        store = GenerationStore(root / "generations" / name)
        store.claim({})
        rows = generations_of(name, count)[::-1]
        for start in range(0, len(rows), 11):
            store.append(rows[start : start + 11], 0)


def hashes(make: Any, root: Path) -> dict[str, dict[str, Any]]:
    """Hash of the samples and the counts of every stream with one tokenizer."""
    fill(root)
    make().save(str(root / "mine.json"))
    settings = TokenizerConfig(kind="file", path=str(root / "mine.json"), eos_token="</s>")
    tokenizer, vocabulary = build_tokenizer(settings, root, [])
    found = {}
    for name, stream in STREAMS.items():
        config = StreamConfig(missing="allow", missing_share=0.5, **stream.options)
        manifest = build_stream(
            stream.kind,
            stream.method,
            stream.generations,
            HELD_OUT if stream.kind == "val" else DOCUMENTS,
            "h",
            tokenizer,
            vocabulary,
            config,
            stream.quality,
            root,
        )
        dataset = LocalDataset(str(root / "streams" / manifest["name"]))
        samples = hashlib.sha256()
        for place in range(len(dataset)):
            shard, row = dataset.spanner[place]
            content = dataset.shards[shard].get_sample_data(row)
            samples.update(hashlib.sha256(content).digest())
        counts = ("samples", "tokens", "real_tokens", "synthetic_tokens", "bytes")
        found[name] = {
            "samples_sha256": samples.hexdigest(),
            "content_sha256": manifest["content_sha256"],
            "config_hash": manifest["config_hash"],
            **{count: manifest[count] for count in counts},
        }
    return found


@pytest.mark.parametrize("make", TOKENIZERS)
def test_samples_are_those_of_earlier_versions(make: Any, tmp_path: Path) -> None:
    assert hashes(make, tmp_path) == json.loads(GOLDEN.read_text())[make.__name__]


if __name__ == "__main__":
    golden = {}
    for one in TOKENIZERS:
        with tempfile.TemporaryDirectory() as scratch:
            golden[one.__name__] = hashes(one, Path(scratch))
    Path(sys.argv[1] if sys.argv[1:] else GOLDEN).write_text(json.dumps(golden, indent=1) + "\n")
