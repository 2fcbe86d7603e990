"""Rows that only name their source find it by its id, in any order of files and rows."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import zstandard

from gen.corpus.documents import CorpusConfig, hash_text, is_held_out, load_split
from tests.conftest import run_script
from tests.gen.exchange.conftest import RunImport
from tests.gen.exchange.test_importing import keys_and_texts

STYLES = ("distill", "diverse_qa_pairs")
SOURCES = 60


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines in several Zstandard frames, as parallel compressors leave them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compress = zstandard.ZstdCompressor().compress
    frames = [rows[start : start + 7] for start in range(0, len(rows), 7)]
    path.write_bytes(
        b"".join(
            compress("".join(json.dumps(row) + "\n" for row in rows).encode()) for rows in frames
        )
    )


def record(number: int, text: str) -> dict[str, Any]:
    identity = f"<urn:uuid:{number:012d}>"
    url = f"https://example.org/{number}"
    return {"warc_record_id": identity, "text": text, "url": url, "language": "en"}


@pytest.fixture
def nemotron(tmp_path: Path) -> Path:
    """Files of Nemotron-CC's layout; every seventh source has no rewrite in the first style."""
    root, shuffle = tmp_path / "data-jsonl", random.Random(0).shuffle
    for quality, numbers in (("high", range(40)), ("low", range(40, SOURCES))):
        rows = [record(number, f"Source text {number}.") for number in numbers]
        shuffle(rows)
        folder = root / f"quality={quality}/kind=actual/kind2=actual"
        write_lines(folder / "CC-MAIN-2013-20-part-00000.jsonl.zstd", rows[::2])
        write_lines(folder / "CC-MAIN-2014-15-part-00001.jsonl.zstd", rows[1::2])
    for style in STYLES:
        folder = root / f"quality=high/kind=synthetic/kind2={style}"
        rows = [
            record(number, f"{style} of {number}, {half}.")
            for number in range(SOURCES + 5)  # five sources are nowhere
            if number % 7 or style != STYLES[0]
            for half in (("only",) if number % 2 else ("first", "second"))
        ]
        shuffle(rows)
        for part in range(3):
            write_lines(folder / f"CC-MAIN-2013-20-part-{part:05d}.jsonl.zstd", rows[part::3])
    return root


@pytest.mark.slow
def test_nemotron_cc_becomes_a_corpus_and_a_store_for_each_style(
    tmp_path: Path, nemotron: Path
) -> None:
    root = tmp_path / "root"
    done = run_script(
        *("generate.py", "generate", f"root={root}", "corpus=import", "generator=import"),
        *(
            "import=nemotron_cc",
            f"import.path={nemotron}",
            "import.only=[distill,diverse_qa_pairs]",
        ),
    )
    train = {document.id: document.text for document in load_split(root, "train")}
    val = {document.id: document.text for document in load_split(root, "val")}
    numbers = range(SOURCES)
    sources = {record(n, "")["warc_record_id"]: f"Source text {n}." for n in numbers}
    assert train | val == sources
    for style in STYLES:
        found = keys_and_texts(root, style)
        made = [
            (row, f"{style} of {n}, {half}.")
            for n in numbers
            if n % 7 or style != STYLES[0]
            for half in (("only",) if n % 2 else ("first", "second"))
            if (row := record(n, "")["warc_record_id"]) in train
        ]
        assert sorted((row[0], row[2]) for row in found) == sorted(made)
        assert all(row[3] == hash_text(sources[row[0]]) for row in found)
        indices: dict[str, list[int]] = {}
        for row in found:
            indices.setdefault(row[0], []).append(row[1])
        assert all(one == list(range(len(one))) for one in indices.values())
    assert "missing_source: 8 (the first: " in done.stdout  # of 60 to 64, the even ones twice
    lacking = sum(n % 7 == 0 and record(n, "")["warc_record_id"] in train for n in numbers)
    assert f"source_without_generations: {lacking} (the first: " in done.stdout


def test_a_style_that_is_fetched_later_leaves_the_others_as_they_are(
    tmp_path: Path, nemotron: Path, run_import: RunImport
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    rows = [record(number, f"Source text {number}.") for number in range(SOURCES)]
    corpus.write_text("\n".join(map(json.dumps, rows)))
    config = CorpusConfig("jsonl", str(corpus), id_column="warc_record_id", held_out=0.2)
    methods = {style: f"quality=*/kind=synthetic/kind2={style}" for style in STYLES}
    settings = {
        "corpus": config,
        "methods": methods,
        "text_column": None,
        "id_column": "warc_record_id",
        "generation_column": "text",
    }
    run_import(nemotron, only=["distill"], **settings)
    parts = list((tmp_path / "root" / "generations" / "distill").glob("part-*"))
    written = [part.stat().st_mtime_ns for part in parts]
    run_import(nemotron, **settings)
    assert [part.stat().st_mtime_ns for part in parts] == written
    assert keys_and_texts(tmp_path / "root", "diverse_qa_pairs")


def test_a_corpus_from_elsewhere_is_joined_by_id(tmp_path: Path, run_import: RunImport) -> None:
    """With ids that are numbers there and texts here."""
    (tmp_path / "corpus.jsonl").write_text(
        "\n".join(json.dumps({"n": n, "text": f"Text {n}."}) for n in range(20))
    )
    rows = [{"of": str(n), "out": f"Rewrite of {n}."} for n in reversed(range(25))]
    write_lines(tmp_path / "files" / "rows.jsonl.zst", rows)
    corpus = CorpusConfig("jsonl", str(tmp_path / "corpus.jsonl"), id_column="n", held_out=0.3)
    settings = {"generation_column": "out", "text_column": None, "id_column": "of"}
    result = run_import(tmp_path / "files", corpus=corpus, **settings)["rephrase"]
    kept = [n for n in range(20) if not is_held_out(str(n), 0.3)]
    assert keys_and_texts(tmp_path / "root") == sorted(
        (str(n), 0, f"Rewrite of {n}.", hash_text(f"Text {n}.")) for n in kept
    )
    assert result["left_out"] == {"missing_source": 5, "held_out": 20 - len(kept)}
    assert result["examples"]["missing_source"][0].endswith("rows.jsonl.zst, row 1: source '24'")
