"""Text files as people have them: compressed, cut off, with byte order marks, in folders of Spark.

Whatever is wrong with a file is one ValueError that names it.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

CHUNK = 1 << 20  # bytes
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
HIDDEN = (".", "_")  # names that begin so are no data: ._x of macOS, _SUCCESS and .x.crc of Spark


def files_below(
    path: Path, endings: tuple[str, ...], setting: str
) -> tuple[list[Path], list[Path]]:
    """The files of a folder with one of ``endings``, in order, and those without; or a file itself.

    Folders are looked through whatever their own name ends in, as Spark's ``x.parquet/`` does.

    Raises:
        FileNotFoundError: there is none, or a link leads nowhere.
    """
    if path.is_file():
        return [path], []
    data = sorted(file for file in path.rglob("*") if is_data(file, path))
    for file in data:
        if not file.exists():
            raise FileNotFoundError(
                f"{file} is a link to {file.readlink()}, which does not exist; mend or remove it"
            )
    found = [file for file in data if file.name.endswith(endings)]
    if not found:
        others = sorted({file.suffix for file in data if file.suffix})
        raise FileNotFoundError(
            f"{setting}={path} holds no file ending in {', '.join(endings)}"
            + (f"; there are {', '.join(others[:8])}" if others else "")
        )
    return found, [file for file in data if not file.name.endswith(endings)]


def is_data(file: Path, root: Path) -> bool:
    """Whether a path below ``root`` is a file of data, or a link that should lead to one."""
    parts = file.relative_to(root).parts
    return not any(part.startswith(HIDDEN) for part in parts) and not file.is_dir()


def open_text(path: Path) -> IO[str]:
    """A UTF-8 text file, decompressed by its ending, without a byte order mark.

    Reading raises ValueError where the archive ends too early, :func:`lines_of` says where.
    """
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    if path.suffix == ".zst":
        frames = ZstdFrames(path.open("rb"), str(path))
        return io.TextIOWrapper(io.BufferedReader(frames, CHUNK), encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


class ZstdFrames(io.RawIOBase):
    """All frames of a .zst file one after the other; the library's own reader tells of no cut."""

    def __init__(self, source: BinaryIO, name: str) -> None:
        self.source, self.name = source, name
        self.frame = zstandard.ZstdDecompressor().decompressobj()
        self.begun = False  # of the present frame something was read
        self.input = self.output = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.source.close()
        super().close()

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        """Decompress the next bytes into ``buffer``; 0 at the end of the last frame."""
        while not self.output:
            if not self.input:
                self.input = self.source.read(CHUNK)
                if not self.input:
                    if self.begun:
                        raise EOFError(f"{self.name} ends inside a frame")
                    return 0
            self.begun = True
            self.output = self.frame.decompress(self.input)
            self.input = self.frame.unused_data if self.frame.eof else b""
            if self.frame.eof:
                self.frame = zstandard.ZstdDecompressor().decompressobj()
                self.begun = False
        count = min(len(buffer), len(self.output))
        buffer[:count] = self.output[:count]
        self.output = self.output[count:]
        return count


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line; the last one may lack its end.

    Raises:
        ValueError: not UTF-8, not what its ending says, or cut off; says near which line.
    """
    number = 0
    with open_text(path) as lines:
        while True:
            number += 1
            try:
                line = lines.readline()
            except UnicodeDecodeError as error:
                hint = "; it looks like UTF-16" if starts_as_utf16(path) else ""
                raise ValueError(
                    f"{path} is not UTF-8 near line {number}: {error}{hint}"
                ) from error
            except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
                raise ValueError(
                    f"{path} is cut off or damaged near line {number} ({error}); copy it again, or "
                    "take it out of the folder"
                ) from error
            if not line:
                return
            yield number, line


def starts_as_utf16(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) in UTF16_MARKS


def whole_text(path: Path) -> str:
    """The text of a file, lines ending in ``\\n``, or an error that says where it is not UTF-8."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = "utf-16" if content.startswith(UTF16_MARKS) else "latin1"
        raise ValueError(
            f"{path} is not UTF-8: byte {content[error.start]:#04x} at offset {error.start}; "
            f"convert it (iconv -f {found} -t utf-8) or leave it out with corpus.pattern"
        ) from error
    return text.replace("\r\n", "\n")


def parquet_rows(path: Path, rows: int) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, read so many at a time.

    Raises:
        ValueError: it is damaged.
    """
    try:
        for batch in pq.ParquetFile(path, pre_buffer=False).iter_batches(rows):
            yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{path} is damaged or no Parquet file ({error}); copy it again, or take it out of the "
            "folder"
        ) from error
