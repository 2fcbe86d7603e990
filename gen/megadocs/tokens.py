"""Token ids of texts, kept beside the generations: a text is tokenized once for all streams.

``root/tokens/<tokenizer>/`` holds parts that are only ever added. A part is a pair of files: the
ids of its texts one after the other (``.ids``, uint32), and for each text a hash of it, the number
of its ids and their checksum (``.keys``, Parquet). A text is found by its hash, so texts that
changed are new ones, and several writers may add parts at once. The folder may be deleted at any
time: what a stream needs is made again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gen.corpus.split import starts_in
from gen.corpus.tokenizer import encode, plain
from gen.generations.store import by_part
from trainer.files import hash_file, is_whole, replace_file, sha256, write_hash

logger = logging.getLogger(__name__)

KEY = 16  # bytes of a text's hash
KEYS = pa.schema(
    [
        ("high", pa.uint64()),  # the text's hash in two halves
        ("low", pa.uint64()),
        ("count", pa.uint32()),  # ids
        ("text_bytes", pa.uint32()),
        ("checksum", pa.uint32()),  # CRC-32 of the ids
    ]
)
BATCH = 512  # texts tokenized together
OPEN_FILES = 256


class DamagedTokensError(ValueError):
    """A file of a token store is not what was written; the message names it and what to do."""


@dataclass(frozen=True)
class Spans:
    """Where the ids of some texts lie: arrays ``[texts]``."""

    part: NDArray[np.int32]  # int32: place in the store's parts; -1: the text is not there
    first: NDArray[np.uint32]  # uint32: its first id in that part
    count: NDArray[np.uint32]  # uint32: of its ids
    text_bytes: NDArray[np.uint32]  # uint32
    checksum: NDArray[np.uint32]  # uint32

    @classmethod
    def none(cls, texts: int) -> Spans:
        """Of texts that are not there."""
        return cls(
            np.full(texts, -1, dtype=np.int32),
            *(np.zeros(texts, dtype=np.uint32) for _ in range(4)),
        )


def key_of(content: bytes | memoryview) -> bytes:
    return hashlib.sha256(content).digest()[:KEY]


def as_keys(digests: Iterable[bytes]) -> NDArray[np.uint64]:
    """Hashes of texts as uint64 ``[texts, 2]``."""
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)


def keys_of_column(texts: pa.ChunkedArray) -> NDArray[np.uint64]:
    """Hashes of a column of ``large_string``: uint64 ``[texts, 2]``."""
    digests: list[bytes] = []
    for chunk in texts.chunks:
        _, borders, content = chunk.buffers()
        ends = np.frombuffer(borders, dtype=np.int64)[chunk.offset :][: len(chunk) + 1].tolist()
        data = memoryview(content) if content is not None else memoryview(b"")
        digests += [key_of(data[start:end]) for start, end in itertools.pairwise(ends)]
    return as_keys(digests)


class TokenStore:
    """What one tokenizer makes of texts: their ids, or the characters where the tokens start.

    Args:
        root: corpus folder.
        tokenizer: a tokenizer; its JSON is the store's identity.
        starts: keep places of characters instead of ids.

    What is there is known after :meth:`load`.
    """

    def __init__(self, root: Path, tokenizer: Tokenizer, starts: bool = False) -> None:
        content = tokenizer.to_str()
        name = hashlib.sha256(content.encode()).hexdigest()[:16]
        self.folder = root / "tokens" / (f"{name}-starts" if starts else name)
        self.starts = starts
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = self.folder / "tokenizer.json"
        if not kept.exists() or sha256(kept)[: len(name)] != name:
            if Tokenizer.from_str(content).to_str() != content:
                raise ValueError(
                    "the tokenizer is another one when it is loaded from its own JSON; save it "
                    "with tokenizers, load that file and save it again"
                )
            with replace_file(kept) as unfinished:
                unfinished.write_text(content)
        self.parts: list[Path] = []  # files of ids
        self.part_texts = np.zeros(1, dtype=np.int32)  # texts before each part, and all
        self.forget()

    def load(self) -> None:
        """Look up what is there; a damaged part is removed, so that its texts are made again.

        Of a text only its hash and its number among all are kept in memory.
        """
        self.parts = []
        texts = [0]  # before each part
        paths = sorted(self.folder.glob("*.keys"))
        room = sum(self.texts_of(path) for path in paths)
        self.high, self.low = np.zeros((2, room), dtype=np.uint64)
        for path in paths:
            table = self.read_keys(path)
            if table is None or texts[-1] + len(table) > room:  # another writer made it just now
                continue
            here = slice(texts[-1], texts[-1] + len(table))
            self.high[here], self.low[here] = table["high"], table["low"]
            self.parts.append(path.with_suffix(".ids"))
            texts.append(here.stop)
        self.part_texts = np.array(texts, dtype=np.int32)
        order = np.argsort(self.high[: texts[-1]], kind="stable").astype(np.int32)
        self.high, self.low, self.text = self.high[order], self.low[order], order

    def forget(self) -> None:
        """Give the memory of the hashes back; :meth:`load` before anything is asked again."""
        self.high, self.low = np.zeros((2, 0), dtype=np.uint64)
        self.text = np.zeros(0, dtype=np.int32)

    def texts_of(self, path: Path) -> int:
        """How many texts a part says it has."""
        with contextlib.suppress(pa.ArrowException, OSError):
            texts: int = pq.read_metadata(path).num_rows
            return texts
        return 0

    def read_keys(self, path: Path) -> pa.Table | None:
        """What is known of the texts of a part; None where it is gone, or damaged and removed."""
        ids = path.with_suffix(".ids")
        try:
            table = pq.read_table(path, schema=KEYS, page_checksum_verification=True)
            if not is_whole(path):
                raise OSError(f"{path.name} is not what was written")
            if not ids.exists() or ids.stat().st_size != 4 * pc.sum(table["count"]).as_py():
                raise OSError(f"{ids.name} is missing or cut off")
        except FileNotFoundError:
            return None  # another writer found it damaged
        except (pa.ArrowException, OSError) as error:
            remove_part(ids, str(error))
            return None
        return table

    def find(self, keys: NDArray[np.uint64]) -> NDArray[np.int32]:
        """The number of each text, -1 where it is not there; ``keys`` are uint64 ``[texts, 2]``."""
        row = np.searchsorted(self.high, keys[:, 0])
        texts = np.full(len(keys), -1, dtype=np.int32)
        candidates = np.arange(len(keys))
        while len(candidates):  # texts whose first halves agree follow each other
            inside = row[candidates] < len(self.high)
            candidates = candidates[inside]
            same = self.high[row[candidates]] == keys[candidates, 0]
            candidates = candidates[same]
            equal = self.low[row[candidates]] == keys[candidates, 1]
            texts[candidates[equal]] = self.text[row[candidates[equal]]]
            candidates = candidates[~equal]
            row[candidates] += 1
        return texts

    def put_spans(
        self, spans: Spans, where: NDArray[np.integer[Any]], texts: NDArray[np.int32], parts: int
    ) -> None:
        """Say in ``spans`` where the ids of texts lie.

        Args:
            spans: of other texts as well.
            where: which of them these are.
            texts: their numbers.
            parts: that stand before this store's among those of the spans.

        Raises:
            DamagedTokensError: a part is not what it was.
        """
        for part, own in by_part(texts, self.part_texts):
            table = self.read_keys(self.parts[part].with_suffix(".keys"))
            if table is None:
                raise DamagedTokensError(
                    f"{self.parts[part]} was damaged and is removed: run the same command again, "
                    "which tokenizes its texts anew"
                )
            within = texts[own] - self.part_texts[part]
            counts = table["count"].to_numpy()
            spans.part[where[own]] = parts + part
            spans.first[where[own]] = (counts.cumsum(dtype=np.int64) - counts)[within]
            spans.count[where[own]] = counts[within]
            spans.text_bytes[where[own]] = table["text_bytes"].to_numpy()[within]
            spans.checksum[where[own]] = table["checksum"].to_numpy()[within]


class IdReader:
    """Reads ids from parts; never maps them, so that they do not count as this process's memory.

    Args:
        parts: of one or several stores.
    """

    def __init__(self, parts: Sequence[Path]) -> None:
        self.parts = parts
        self.files: OrderedDict[int, int] = OrderedDict()

    def read(self, part: int, first: int, count: int, checksum: int) -> bytes:
        """The ids of one text as uint32.

        Raises:
            DamagedTokensError: they are not what was written; the part is removed.
        """
        file = self.files.get(part)
        if file is None:
            if len(self.files) == OPEN_FILES:
                os.close(self.files.popitem(last=False)[1])
            file = self.files[part] = os.open(self.parts[part], os.O_RDONLY)
        content = os.pread(file, 4 * count, 4 * first)
        if zlib.crc32(content) != checksum:
            path = self.parts[part]
            remove_part(path, f"the ids of a text, from place {first} on, were changed")
            raise DamagedTokensError(
                f"{path} was damaged and is removed: run the same command again, which tokenizes "
                "its texts anew"
            )
        return content

    def close(self) -> None:
        for file in self.files.values():
            os.close(file)
        self.files.clear()


def remove_part(ids: Path, problem: str) -> None:
    """Take a damaged part away, its keys first."""
    logger.warning(f"{ids} is damaged ({problem}): its texts are tokenized again")
    keys = ids.with_suffix(".keys")
    for path in (keys, hash_file(keys)):
        path.unlink(missing_ok=True)
    ids.unlink(missing_ok=True)


@functools.lru_cache(maxsize=4)
def tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer that a store's ids are of."""
    return plain(Tokenizer.from_file(str(folder / "tokenizer.json")))


def add_part(folder: Path, texts: Sequence[str]) -> None:
    """Tokenize texts and add them to the store in ``folder`` as one part, unless they are there.

    Raises:
        OSError: the disk is full; the store is as it was before.
    """
    digests = [key_of(text.encode()) for text in texts]
    name = hashlib.sha256(b"".join(digests)).hexdigest()[:16]
    if (folder / f"{name}.keys").exists():
        return
    for leftover in folder.glob(f".{name}.*.tmp"):  # of a process that was killed at this part
        leftover.unlink()
    values = starts_of if folder.name.endswith("-starts") else encode
    tokenizer = tokenizer_of(folder)
    counts: list[int] = []
    checksums: list[int] = []
    with replace_file(folder / f"{name}.ids") as unfinished, unfinished.open("wb") as file:
        for start in range(0, len(texts), BATCH):
            for ids in values(tokenizer, list(texts[start : start + BATCH])):
                content = np.array(ids, dtype="<u4").tobytes()
                counts.append(len(ids))
                checksums.append(zlib.crc32(content))
                file.write(content)
    keys = as_keys(digests)
    sizes = [len(text.encode()) for text in texts]
    columns = [keys[:, 0], keys[:, 1], counts, sizes, checksums]
    with replace_file(folder / f"{name}.keys") as unfinished:
        pq.write_table(
            pa.table([pa.array(column) for column in columns], KEYS.names).cast(KEYS),
            unfinished,
            compression="none",
            write_page_checksum=True,
        )
        write_hash(folder / f"{name}.keys", unfinished)


def starts_of(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The character where each token of each text starts."""
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [starts_in(encoding.offsets) for encoding in encodings]
