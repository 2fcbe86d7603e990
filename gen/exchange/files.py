"""Files of rows: found by folder, glob or URI, read row by row, whatever is broken in them named.

Parquet, JSON lines (plain, gzip, Zstandard) and Arrow files of ``datasets``; local or wherever
fsspec reaches.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.fs as arrow_fs
import pyarrow.parquet as pq
import zstandard
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.implementations.local import LocalFileSystem

from gen.corpus.files import CHUNK, HIDDEN, ZstdFrames
from trainer.object_store import filesystem, first_line, is_remote

BATCH_ROWS = 256
PARQUET = (".parquet",)
ARROW = (".arrow",)
LINES = tuple(
    name + packed
    for name in (".jsonl", ".json", ".ndjson")
    for packed in ("", ".gz", ".zst", ".zstd")
)
ENDINGS = (*PARQUET, *ARROW, *LINES)
BESIDE_ARROW = ("dataset_info.json", "state.json", "dataset_dict.json")  # of datasets, no rows
READ_ERRORS = (OSError, EOFError, zlib.error, zstandard.ZstdError, pa.ArrowException)


@dataclass(frozen=True)
class SourceFile:
    """One file of rows."""

    path: str  # with its protocol where it is remote
    size: int  # bytes
    version: str  # changes when the file does


@dataclass(frozen=True)
class Odd:
    """A row, or a whole file, that cannot be read."""

    reason: str
    detail: str


def find_files(where: str, setting: str) -> list[SourceFile]:
    """The files of rows at a folder, glob, file or URI, sorted by path.

    Args:
        where: the place.
        setting: what to name in errors.

    Raises:
        FileNotFoundError: there are none.
        OSError: the place cannot be reached, or not with these credentials.
    """
    try:
        system, path = filesystem(where)
    except ValueError as error:
        raise ValueError(f"{setting}={error}") from error
    try:
        found = list_files(system, path)
    except Exception as error:  # every driver has its own
        if isinstance(system, LocalFileSystem):
            raise
        raise OSError(f"{setting}={where} cannot be listed: {first_line(error)}") from error
    names = sorted(name for name in set(found) if not is_hidden(name, path))
    if any(name.endswith(ARROW) for name in names):
        names = [name for name in names if PurePosixPath(name).name not in BESIDE_ARROW]
    names = [name for name in names if name.endswith(ENDINGS)]
    if not names:
        raise FileNotFoundError(
            f"{setting}={where} holds no file ending in {', '.join(ENDINGS)}"
            + (f"; it holds {PurePosixPath(sorted(found)[0]).name}, ..." if found else "")
        )
    local = isinstance(system, LocalFileSystem)
    files = []
    for name in names:
        info = system.info(name)
        version = info.get("mtime") or info.get("ETag") or info.get("blob_id") or ""
        full = name if local else f"{where.partition('://')[0]}://{name}"
        if not local and "://" in name:
            full = name
        files.append(SourceFile(full, int(info["size"] or 0), str(version)))
    return files


def list_files(system: fsspec.AbstractFileSystem, path: str) -> list[str]:
    """Files at a folder, glob or file; where that cannot be told an error, and not nothing."""
    folder = path
    if any(character in path for character in "*?["):
        folder = re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0]
        found = [name for match in system.glob(path) for name in system.find(match)]
    else:
        found = system.find(path)
    if not found:  # find and glob hide errors
        if isinstance(system, ArrowFSWrapper):
            system.fs.get_file_info(arrow_fs.FileSelector(folder, allow_not_found=True))
        else:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                system.ls(folder)
    return found


def is_hidden(name: str, place: str) -> bool:
    """Whether a file, or a folder of it below the place asked for, is none of data by its name."""
    below = name.removeprefix(place) if name != place else ""
    return any(part.startswith(HIDDEN) for part in below.split("/"))


def open_file(path: str) -> Any:
    """A file as pyarrow reads it best."""
    system, inner = filesystem(path)
    if isinstance(system, LocalFileSystem):
        return pa.OSFile(inner)
    return pa.PythonFile(system.open(inner, "rb"), mode="r")


def sha256_of(path: str) -> str:
    """Hash of a file's bytes; of a file on the Hugging Face hub this is its LFS object id."""
    content = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(CHUNK):
            content.update(block)
    return content.hexdigest()


def row_groups(file: SourceFile) -> list[tuple[int, int]] | None:
    """Rows and uncompressed bytes of each row group; None for what can only be read in a row."""
    if not file.path.endswith(PARQUET):
        return None
    try:
        with open_file(file.path) as opened:
            footer = pq.read_metadata(opened)
    except READ_ERRORS:
        return None  # counted by whoever reads it
    groups = (footer.row_group(group) for group in range(footer.num_row_groups))
    return [(group.num_rows, group.total_byte_size) for group in groups]


def schema_names(path: str) -> list[str]:
    """Columns of a Parquet or Arrow file; none where each row has its own, or it is unreadable."""
    names: list[str] = []
    with contextlib.suppress(*READ_ERRORS), open_file(path) as opened:
        if path.endswith(PARQUET):
            names = pq.read_schema(opened).names
        elif path.endswith(ARROW):
            names = arrow_reader(opened).schema.names
    return names


def read_rows(
    path: str, columns: Sequence[str], groups: Sequence[int] | None = None
) -> Iterator[tuple[int, dict[str, Any] | Odd]]:
    """Rows with their numbers, from 1; where something is broken an :class:`Odd` in its place.

    Args:
        path: the file.
        columns: top-level columns that are wanted.
        groups: row groups of a Parquet file; None: all.
    """
    try:
        if path.endswith(PARQUET):
            yield from parquet_rows(path, columns, groups)
        elif path.endswith(ARROW):
            yield from arrow_rows(path, columns)
        else:
            yield from json_rows(path)
    except READ_ERRORS as error:
        yield 0, damage("unreadable_file", path, error)


def damage(reason: str, path: str, error: Exception, where: str = "") -> Odd:
    """What an error in reading says of the file.

    Raises:
        OSError: a file elsewhere did not come; that is no damage, and its rows must not be missed.
    """
    if is_remote(path) and isinstance(error, OSError):
        raise OSError(
            f"{path} cannot be read: {first_line(error)}. Run the same command to go on. If the "
            "file itself is damaged, import a local copy: what is around the damage is read"
        ) from error
    return Odd(reason, where + first_line(error))


def parquet_rows(
    path: str, columns: Sequence[str], groups: Sequence[int] | None
) -> Iterator[tuple[int, dict[str, Any] | Odd]]:
    """Numbered rows of some row groups of a Parquet file; what is damaged counts its rows."""
    with open_file(path) as opened, pq.ParquetFile(opened, pre_buffer=False) as parquet:
        present = [name for name in columns if name in parquet.schema_arrow.names]
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        for group in range(len(sizes)) if groups is None else groups:
            start = done = sum(sizes[:group])
            try:
                for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=present):
                    yield from numbered(batch, done + 1)
                    done += batch.num_rows
            except READ_ERRORS as error:
                lost = f"rows {done + 1} to {start + sizes[group]}: "
                yield done + 1, damage("damaged_rows", path, error, lost)


def arrow_rows(path: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any] | Odd]]:
    """Arrow files as ``datasets`` writes them (streams), or with a footer."""
    done = 0
    with open_file(path) as opened:
        reader = arrow_reader(opened)
        if isinstance(reader, pa.ipc.RecordBatchFileReader):
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = iter(reader)
        present = [name for name in columns if name in reader.schema.names]
        try:
            for batch in batches:
                chosen = batch.select(present)
                for start in range(0, batch.num_rows, BATCH_ROWS):
                    yield from numbered(chosen.slice(start, BATCH_ROWS), done + start + 1)
                done += batch.num_rows
        except READ_ERRORS as error:
            yield done + 1, damage("truncated_file", path, error)


def arrow_reader(opened: Any) -> Any:
    """A reader of Arrow's stream format or, where the file says so, its file format."""
    is_file = opened.read(6) == b"ARROW1"
    opened.seek(0)
    return pa.ipc.open_file(opened) if is_file else pa.ipc.open_stream(opened)


def numbered(batch: pa.RecordBatch, first: int) -> Iterator[tuple[int, dict[str, Any] | Odd]]:
    """The rows of a batch; one that is not UTF-8 costs itself alone."""
    try:
        yield from enumerate(batch.to_pylist(), first)
    except UnicodeDecodeError:
        for place in range(batch.num_rows):
            try:
                yield first + place, batch.slice(place, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield first + place, Odd("not_utf8", str(error))


def json_rows(path: str) -> Iterator[tuple[int, dict[str, Any] | Odd]]:
    """One JSON object a line."""
    with open_file(path) as opened:
        lines = plain_lines(path, opened)
        number = 0
        while True:
            number += 1
            try:
                line = lines.readline()
            except READ_ERRORS as error:
                yield number, damage("truncated_file", path, error)
                return
            if not line:
                return
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, parsed(line)


def plain_lines(path: str, opened: Any) -> io.BufferedIOBase:
    """The lines of a file, decompressed by its ending; a cut costs no line before it."""
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=opened)  # buffered itself; a second buffer would lose rows
    if path.endswith((".zst", ".zstd")):
        return io.BufferedReader(ZstdFrames(opened, path), CHUNK)
    return io.BufferedReader(opened, CHUNK)


def parsed(line: bytes) -> dict[str, Any] | Odd:
    """The object of a line."""
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        return Odd("not_utf8", str(error))
    except (ValueError, RecursionError) as error:
        return Odd("broken_row", f"not JSON: {error}")
    return row if isinstance(row, dict) else Odd("broken_row", f"no object: {str(row)[:60]!r}")
