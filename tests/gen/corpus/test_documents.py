"""Reading documents: formats, duplicates, splits, budgets, bad input."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from gen.corpus.documents import (
    CorpusConfig,
    build_documents,
    is_held_out,
    load_split,
    read_documents,
)
from gen.corpus.tokenizer import TokenizerConfig, build_tokenizer, encode
from gen.pipeline import cut_to_budget

ROWS = [{"id": f"d{i}", "text": f"Text number {i}. " * 5, "year": i} for i in range(40)]


def write_jsonl(path: Path) -> Path:
    content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zst":
        path.write_bytes(zstandard.ZstdCompressor().compress(content))
    else:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["docs.jsonl", "docs.jsonl.gz", "docs.jsonl.zst"])
def test_jsonl(tmp_path: Path, name: str) -> None:
    path = write_jsonl(tmp_path / name)
    for source in (path, tmp_path):  # the file, or its folder
        config = CorpusConfig(format="jsonl", path=str(source), id_column="id")
        documents = list(read_documents(config))
        assert [document.id for document in documents] == [row["id"] for row in ROWS]
        assert documents[3].metadata == {"year": 3}


def test_parquet_and_hugging_face_read_the_same(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "train.parquet")
    read = {
        name: list(read_documents(CorpusConfig(format=name, path=str(tmp_path), id_column="id")))
        for name in ("parquet", "huggingface")
    }
    assert read["parquet"] == read["huggingface"]
    assert len(read["parquet"]) == len(ROWS)


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "sub" / "b.txt").write_text("zwei ä")
    (tmp_path / "c.md").write_text("not asked for")
    documents = list(read_documents(CorpusConfig(format="text", path=str(tmp_path))))
    assert [(d.id, d.text) for d in documents] == [("a.txt", "one"), ("sub/b.txt", "zwei ä")]


def test_the_built_in_corpus_is_there() -> None:
    documents = list(read_documents(CorpusConfig()))
    assert len(documents) > 70
    assert max(len(document.text) for document in documents) > 30_000


def test_empty_and_duplicate_texts_are_counted(tmp_path: Path) -> None:
    rows = [*ROWS, {"id": "copy", "text": ROWS[0]["text"]}, {"id": "blank", "text": " \n"}]
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = CorpusConfig(format="jsonl", path=str(path), id_column="id", held_out=0.2)
    manifest = build_documents(config, tmp_path / "root")
    counts = manifest["counts"]
    assert (counts["read"], counts["duplicate"], counts["empty"]) == (42, 1, 1)
    assert counts["train"] + counts["val"] == 40
    before = (tmp_path / "root/documents/train.parquet").stat().st_mtime_ns
    assert build_documents(config, tmp_path / "root") == manifest
    assert (tmp_path / "root/documents/train.parquet").stat().st_mtime_ns == before


def test_the_split_does_not_move_when_documents_are_added(tmp_path: Path) -> None:
    splits = []
    for count in (25, 40):
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:count]))
        root = tmp_path / f"root{count}"
        config = CorpusConfig(format="jsonl", path=str(path), id_column="id", held_out=0.2)
        build_documents(config, root)
        splits.append({document.id for document in load_split(root, "val")})
    assert splits[0] == {name for name in splits[1] if int(name[1:]) < 25}
    share = sum(is_held_out(str(i), 0.2) for i in range(5000)) / 5000
    assert 0.18 < share < 0.22


def test_a_file_that_is_not_utf8_is_named_with_the_offset(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"good \xff bad")
    with pytest.raises(ValueError, match=r"bad\.txt is not UTF-8: byte 0xff at offset 5"):
        list(read_documents(CorpusConfig(format="text", path=str(tmp_path))))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CorpusConfig(format="csv"), "corpus.format=csv"),
        (CorpusConfig(format="text"), "needs corpus.path"),
        (CorpusConfig(format="text", path="/nowhere"), "/nowhere does not exist"),
    ],
)
def test_sources_that_are_not_there(config: CorpusConfig, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        list(read_documents(config))


def test_bad_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(ValueError, match="line 2 has no column 'text'"):
        list(read_documents(CorpusConfig(format="jsonl", path=str(path))))
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        list(read_documents(CorpusConfig(format="jsonl", path=str(path))))


def test_an_empty_corpus_and_a_repeated_id_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("  ")
    with pytest.raises(ValueError, match="no train document is left: 1 read, 1 empty"):
        build_documents(CorpusConfig(format="text", path=str(tmp_path)), tmp_path / "root")
    path = tmp_path / "docs.jsonl"
    path.write_text('{"id": "x", "text": "a"}\n{"id": "x", "text": "b"}\n')
    with pytest.raises(ValueError, match="have the id 'x'"):
        build_documents(
            CorpusConfig(format="jsonl", path=str(path), id_column="id"), tmp_path / "root2"
        )


def test_a_token_budget_is_met_exactly(tmp_path: Path) -> None:
    root = tmp_path / "root"
    build_documents(CorpusConfig(held_out=0.1), root)
    documents = list(load_split(root, "train"))
    texts = [document.text for document in documents]
    tokenizer, _ = build_tokenizer(TokenizerConfig(vocab_size=400), root, texts)
    for budget in (500, 5000, 12_345):
        kept = cut_to_budget(documents, budget, tokenizer)
        tokens = sum(len(ids) + 1 for ids in encode(tokenizer, [d.text for d in kept]))
        assert tokens == budget
    with pytest.raises(ValueError, match="token_budget=900,000,000 is more than"):
        cut_to_budget(documents, 900_000_000, tokenizer)
    with pytest.raises(ValueError, match="token_budget=1 must be at least 2"):
        cut_to_budget(documents, 1, tokenizer)


def test_another_source_does_not_take_the_place_of_a_corpus(tmp_path: Path) -> None:
    """``corpus=...`` left out on a later call means the built-in corpus."""
    config = CorpusConfig(format="jsonl", path=str(write_jsonl(tmp_path / "a.jsonl")), held_out=0.2)
    root = tmp_path / "root"
    manifest = build_documents(config, root)
    with pytest.raises(ValueError, match=r"another corpus \(corpus.format: jsonl -> pydoc; "):
        build_documents(CorpusConfig(), root)
    assert build_documents(replace(config, max_documents=30), root)["counts"]["read"] == 30
    assert build_documents(config, root) == manifest


def test_a_source_that_cannot_be_read_leaves_the_documents_there(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    config = CorpusConfig(format="jsonl", path=str(path), held_out=0.2)
    root = tmp_path / "root"
    build_documents(config, root)
    before = {file.name: file.read_bytes() for file in (root / "documents").iterdir()}
    path.write_text("not JSON")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        build_documents(config, root)
    path.write_text('{"text": " "}\n')
    with pytest.raises(ValueError, match="no train document is left"):
        build_documents(config, root)
    assert {file.name: file.read_bytes() for file in (root / "documents").iterdir()} == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('"a text"', "line 2 is not a JSON object but 'a text'"),
        ('{"text": ["a"]}', "line 2: 'text' is not a text but \"\\['a'\\]\""),
        ('{"text": "half \\ud83d"}', "line 2: .* half of a surrogate pair at character 5"),
        ("[" * 100_000, "line 2 is not JSON: maximum recursion depth"),
    ],
    ids=["text", "list", "half a pair", "deep"],
)
def test_rows_that_hold_no_text_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        list(read_documents(CorpusConfig(format="jsonl", path=str(path))))
