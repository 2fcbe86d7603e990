"""Corpora as people have them: Spark's folders, archives that are cut off, marks, dead links."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from gen.corpus.documents import CorpusConfig, build_documents, read_documents

ROWS = [{"text": f"Text number {number}. " * 9} for number in range(60)]
CONTENT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def texts(path: Path, kind: str = "jsonl") -> list[str]:
    return [document.text for document in read_documents(CorpusConfig(kind, str(path)))]


def frames(content: bytes, size: int) -> list[bytes]:
    """As pzstd writes: frames that know nothing of lines."""
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    return [zstandard.ZstdCompressor().compress(piece) for piece in pieces]


@pytest.mark.parametrize("name", ["a.json.gz", "a.ndjson.zst", "a.json", "a.jsonl"])
def test_every_ending_is_read_beside_others(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "other"}\n')
    (tmp_path / "notes.md").write_text("no data")
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "._b.jsonl").write_bytes(b"\x00\x05")
    packed = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    (tmp_path / name).write_bytes(packed.get(Path(name).suffix, bytes)(CONTENT))
    assert texts(tmp_path) == [row["text"] for row in ROWS] + ["other"]
    assert "1 files are not read, they do not end in .jsonl" in capsys.readouterr().err


def test_sparks_folders_are_folders(tmp_path: Path) -> None:
    folder = tmp_path / "x.parquet"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "part-00000.snappy.parquet")
    (folder / "_SUCCESS").touch()
    (folder / ".part-00000.snappy.parquet.crc").write_bytes(b"crc")
    for path in (folder, tmp_path):
        assert texts(path, "parquet") == [row["text"] for row in ROWS]


def test_all_frames_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames(CONTENT, 1000)))
    assert texts(tmp_path) == [row["text"] for row in ROWS]


@pytest.mark.parametrize("kind", ["gz", "zst", "frames", "parquet"])
def test_an_archive_that_is_cut_off_is_found_before_anything_is_built(
    tmp_path: Path, kind: str
) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    source.mkdir()
    whole = {
        "gz": gzip.compress(CONTENT),
        "zst": zstandard.ZstdCompressor().compress(CONTENT),
        "frames": b"".join(frames(CONTENT, 1000)[:-3]),
    }
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), source / "a.parquet")
        path = source / "a.parquet"
        path.write_bytes(path.read_bytes()[:-20])
        said = "damaged or no Parquet"
    else:
        path = source / f"a.jsonl.{kind.replace('frames', 'zst')}"
        path.write_bytes(whole[kind] if kind == "frames" else whole[kind][:-20])
        said = "is the file cut off" if kind == "frames" else "cut off or damaged near line"
    config = CorpusConfig("parquet" if kind == "parquet" else "jsonl", str(source), held_out=0.5)
    with pytest.raises(ValueError, match=rf"{path}.*{said}"):
        build_documents(config, root)
    assert not list((root / "documents").iterdir())


def test_what_is_no_archive_is_named(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.zst"):
        (tmp_path / name).write_bytes(b'{"text": "not packed"}\n')
        with pytest.raises(ValueError, match=rf"{name} is cut off or damaged"):
            texts(tmp_path / name)


def test_marks_and_line_ends_are_no_text(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(mark + b'{"text": "one"}\r\n{"text": "two"}\r\n')
    assert texts(tmp_path / "a.jsonl") == ["one", "two"]
    (tmp_path / "a.txt").write_bytes(mark + b"one\r\ntwo\r\n")
    assert texts(tmp_path, "text") == ["one\ntwo\n"]
    (tmp_path / "a.txt").write_bytes("zwei".encode("utf-16"))
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8.*iconv -f utf-16"):
        texts(tmp_path, "text")


def test_a_dead_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(FileNotFoundError, match=r"a\.jsonl is a link to .*gone\.jsonl, which"):
        texts(tmp_path)
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(FileNotFoundError, match=r"a\.txt is a link to"):
        texts(tmp_path, "text")


def test_the_spelling_of_a_path_makes_no_other_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    (source / "a.jsonl").write_bytes(CONTENT)
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(source)
    spellings = [str(source), "../texts", ".", f"{source}/", "../link"]
    built, written = [], set()
    for path in spellings:
        built.append(build_documents(CorpusConfig("jsonl", path, held_out=0.2), tmp_path / "root"))
        written.add(os.stat(tmp_path / "root" / "documents" / "train.parquet").st_mtime_ns)
    assert all(manifest == built[0] for manifest in built)
    assert len(written) == 1  # it was built once
