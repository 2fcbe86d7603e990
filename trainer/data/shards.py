"""Samples of MDS shards, read where they lie in the file.

mosaicml-streaming gives the format; its reader opens a file for every sample and decodes all of its
columns, and importing it takes seconds. A window of training needs some tokens of a sample and
nothing else. They are the last column, so where they lie follows from the end of the sample and
its length, and they are read straight into the batch.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.format import DamagedStreamError, build_again

INDEX = "index.json"
WORD = 4  # bytes of a number in the head of a shard or sample, and of a token
OPEN_FILES = 256
VALUE_TYPES = {"ndarray:uint32": "<u4", "ndarray:uint8": "u1"}


@dataclass(frozen=True)
class Shard:
    """One MDS file."""

    name: str
    samples: int
    size: int  # bytes
    sha256: str
    columns: tuple[tuple[str, str], ...]  # names and encodings, in the order they are stored in

    def decode(self, sample: bytes) -> dict[str, Any]:
        """The columns of a sample.

        Raises:
            ValueError: it is damaged.
        """
        sizes = np.frombuffer(sample, "<u4", len(self.columns)).tolist()
        start = WORD * len(sizes)
        row: dict[str, Any] = {}
        for (name, encoding), size in zip(self.columns, sizes, strict=True):
            value = sample[start : start + size]
            start += size
            if encoding in VALUE_TYPES:  # a byte tells how wide the number of values is
                shape = 1 + (1 << (value[0] & 3))
                count = int.from_bytes(value[1:shape], "little")
                row[name] = np.frombuffer(value, VALUE_TYPES[encoding], count, shape)
            else:
                row[name] = value.decode() if encoding == "str" else json.loads(value)
        if start != len(sample):
            raise ValueError(f"its columns have {start} bytes, it has {len(sample)}")
        return row


def read_index(folder: Path, files: dict[str, dict[str, Any]]) -> list[Shard]:
    """All shards of a stream, in their order.

    Args:
        folder: that holds ``index.json``.
        files: what the manifest says of every file.

    Raises:
        DamagedStreamError: they are no shards of a stream, or the manifest does not know them.
    """
    shards = []
    for entry in json.loads((folder / INDEX).read_bytes())["shards"]:
        columns = tuple(zip(entry["column_names"], entry["column_encodings"], strict=True))
        name = entry["raw_data"]["basename"]
        known = entry["format"], entry["version"], entry["compression"], columns[-1:]
        if known != ("mds", 2, None, (("tokens", "ndarray:uint32"),)) or name not in files:
            raise DamagedStreamError(
                f"{folder / INDEX} tells of a shard that holds no megadocs: {entry}; "
                f"{build_again(folder)}"
            )
        size = entry["raw_data"]["bytes"]
        shards.append(Shard(name, entry["samples"], size, files[name]["sha256"], columns))
    return shards


class ShardFiles:
    """The samples of shards that lie in a folder; any thread may read.

    Files are kept open and not mapped: what is mapped counts as memory of every rank.

    Args:
        folder: of the shards.
        shards: all of the stream, in their order; a file must be there when it is read.
    """

    def __init__(self, folder: Path, shards: list[Shard]) -> None:
        self.files: dict[int, int] = {}  # that are open, by shard
        self.lock = threading.Lock()
        self.folder = folder
        self.shards = shards
        counts = [shard.samples for shard in shards]
        self.first: NDArray[np.int64] = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        # Where every sample ends in its file, uint32 [N]; 0 until its shard was looked at.
        self.ends = np.zeros(int(self.first[-1]), dtype=np.uint32)

    def close(self) -> None:
        with self.lock:
            while self.files:
                os.close(self.files.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def shards_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shard of each sample."""
        return np.searchsorted(self.first, samples, "right") - 1

    def place_of(self, sample: int) -> tuple[int, int]:
        """Shard of a sample, and its place in it."""
        if not 0 <= sample < len(self.ends):
            raise IndexError(f"{self.folder} has {len(self.ends)} samples and none at {sample}")
        shard = int(np.searchsorted(self.first, sample, "right")) - 1
        return shard, sample - int(self.first[shard])

    def read(self, shard: int, into: memoryview, start: int) -> None:
        """Fill ``into`` with the bytes of a shard from ``start`` on.

        Raises:
            ValueError: the file ends before.
            OSError: it cannot be read.
        """
        with self.lock:
            self.fill(self.file_of(shard), into, start, shard)

    def file_of(self, shard: int) -> int:
        """The open file of a shard; the lock is held."""
        file = self.files.get(shard)
        if file is None:
            if len(self.files) >= OPEN_FILES:
                os.close(self.files.pop(next(iter(self.files))))
            file = self.files[shard] = os.open(self.folder / self.shards[shard].name, os.O_RDONLY)
        return file

    def fill(self, file: int, into: memoryview, start: int, shard: int) -> None:
        """Read until ``into`` is full; the lock is held."""
        while len(into):
            count = os.preadv(file, [into], start)
            if not count:
                raise ValueError(
                    f"{self.folder / self.shards[shard].name} ends before byte {start}: it was "
                    f"truncated or changed; {build_again(self.folder)}"
                )
            into, start = into[count:], start + count

    def look_at(self, shard: int) -> None:
        """Read where the samples of a shard end."""
        count = self.shards[shard].samples
        ends = np.empty(count, dtype="<u4")
        self.read(shard, ends.data.cast("B"), 2 * WORD)
        self.ends[self.first[shard] : self.first[shard + 1]] = ends

    def sample(self, shard: int, index: int) -> bytes:
        """All of a sample."""
        borders = np.empty(2, dtype="<u4")
        self.read(shard, borders.data.cast("B"), WORD * (1 + index))
        start, end = borders.tolist()
        content = bytearray(max(0, end - start))
        self.read(shard, memoryview(content), start)
        return bytes(content)

    def read_tokens(
        self,
        out: NDArray[np.uint32],
        places: NDArray[np.int64],
        samples: NDArray[np.int64],
        before_end: NDArray[np.int64],
        counts: NDArray[np.int64],
    ) -> None:
        """Read pieces of samples into ``out`` uint32.

        Args:
            out: token ids.
            places: where each piece goes in it, int64 ``[P]``.
            samples: int64 ``[P]``.
            before_end: tokens from the beginning of the piece to the end of its sample, ``[P]``.
            counts: tokens of each piece, ``[P]``.

        Raises:
            ValueError: a file is shorter than it was.
            OSError: it cannot be read.
        """
        shards = self.shards_of(samples)
        ends = self.ends[samples]
        if not ends.all():
            for shard in set(shards[ends == 0].tolist()):
                self.look_at(shard)
            ends = self.ends[samples]
        starts = ends - WORD * before_end  # [P] in the file
        columns = (shards, starts, WORD * places, WORD * (places + counts))
        view = out.data.cast("B")
        with self.lock:
            for shard, start, first, last in zip(*(c.tolist() for c in columns), strict=True):
                self.fill(self.file_of(shard), view[first:last], start, shard)
