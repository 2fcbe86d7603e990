"""Generations on disk: append-only Parquet parts, each complete or not there.

A part is written under a temporary name, synced and renamed, its SHA-256 beside it (Parquet's own
checksums leave out what tells where everything is); many small ones are merged. The keys
that are present are the state of a job, so it resumes by asking what is missing. Rows of one key
can be written only once: a lock keeps a second writer out, and several writers (one per node) share
a store by owning disjoint documents.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gen.corpus.documents import Document
from trainer.data.format import damaged_files
from trainer.files import (
    hash_file,
    only_one,
    read_hash,
    read_sealed,
    replace_file,
    write_hash,
    write_sealed,
)

SCHEMA = pa.schema(
    [
        ("document_id", pa.string()),
        ("method", pa.string()),
        ("index", pa.int32()),
        ("text", pa.large_string()),
        ("model", pa.string()),
        ("prompt_version", pa.string()),
        ("temperature", pa.float32()),
        ("top_p", pa.float32()),
        ("max_tokens", pa.int32()),
        ("seed", pa.int64()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
        ("cached_tokens", pa.int32()),
        ("truncated", pa.bool_()),
        ("created_at", pa.float64()),
        ("text_hash", pa.string()),  # null in parts that were written before it was kept
    ]
)

BATCH_ROWS = 4096  # of a part that is read bit by bit
IMPORT_RECORD = "import.json"  # of a store that gen/exchange filled; written last
# Settings that older versions did not have and did not write down, with what they meant.
ADDED_SETTINGS: dict[str, Any] = {"extra_body": {}, "extra_headers": {}}


@dataclass(frozen=True)
class Generation:
    """One text a model wrote for a document; the key is (document_id, text_hash, index)."""

    document_id: str
    method: str
    index: int
    text: str
    model: str
    prompt_version: str  # hash of the system message and the prompt template
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    finish_reason: str  # stop, or length where it was cut off
    prompt_tokens: int | None  # None where the server does not tell
    completion_tokens: int | None
    cached_tokens: int  # prompt tokens the server had in its cache
    truncated: bool  # the document was cut to fit the generator's context
    text_hash: str | None = None  # of the document; one that was edited needs new generations
    created_at: float = field(default_factory=time.time)  # seconds since the epoch


class GenerationStore:
    """The generations of one method in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of_method(
        cls, root: Path, method: str, generations: int, latent: bool = False
    ) -> GenerationStore:
        """The store of a method; thoughts belong to the cuts of one G, so each G has a folder."""
        name = f"{method}-g{generations}" if latent else method
        return cls(root / "generations" / name)

    @property
    def imported(self) -> bool:
        """Whether an import filled it (and ended): documents may lack generations."""
        return (self.folder / IMPORT_RECORD).exists()

    @property
    def imported_generations(self) -> int:
        """The largest G of a document, as an import counted it."""
        largest: int = self.import_record()["largest_g"]
        return largest

    def claim(self, settings: dict[str, Any]) -> None:
        """Create the store, or check that it was written with the same settings.

        What an older version did not write down is not compared.

        Raises:
            ValueError: another prompt, model or sampling wrote it; names the differences.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = self.folder / "manifest.json"
        if not manifest.exists():
            write_sealed(manifest, settings)
            return
        found = {**ADDED_SETTINGS, **self.settings()}
        settings = {**ADDED_SETTINGS, **settings}
        different = [
            f"{key}: {difference(found[key], settings.get(key))}"
            for key in sorted(found)
            if found[key] != settings.get(key)
        ]
        if different:
            raise ValueError(
                f"{self.folder} was written with other settings ({'; '.join(different)}). "
                "Generations of one method must be alike: use the old settings, another root=..., "
                "or delete that folder"
            )

    def settings(self) -> dict[str, Any]:
        """What the store was written with.

        Raises:
            ValueError: that file is damaged.
        """
        return read_sealed(
            self.folder / "manifest.json",
            "delete it and run generate.py again with the settings of the generations that are "
            "there: it is written anew",
        )

    def import_record(self) -> dict[str, Any]:
        """What an import wrote when it ended.

        Raises:
            ValueError: that file is damaged.
        """
        return read_sealed(self.folder / IMPORT_RECORD, "delete it and run the same import again")

    @contextlib.contextmanager
    def lock(self, writer: int, writers: int) -> Iterator[None]:
        """Keep other jobs from writing the same documents.

        A writer holds the lock of its part. Jobs begin one after the other, and none begins while
        another divides the documents by another number.

        Raises:
            ValueError: another job holds the lock.
        """
        with contextlib.ExitStack() as held:
            try:
                with only_one(self.folder / "store.lock"):
                    for other in self.folder.glob("writer-*-of-*.lock"):
                        if not other.stem.endswith(f"-of-{writers}"):
                            with only_one(other, wait=False):
                                pass  # left by a job that has ended
                    own = self.folder / f"writer-{writer}-of-{writers}.lock"
                    held.enter_context(only_one(own, wait=False))
            except BlockingIOError:
                raise ValueError(
                    f"another job is writing {self.folder}; wait for it, or split the work with "
                    "generator.writer=0 generator.writers=2 and generator.writer=1 ..."
                ) from None
            yield

    def parts(self) -> list[Path]:
        """Complete parts in a fixed order, without those that a merged part has replaced."""
        found = sorted(
            (writer, first, -last, path)
            for path in self.folder.glob("part-*.parquet")
            for writer, first, last in [numbers_of(path)]
        )
        kept: list[Path] = []
        covered = (-1, -1)  # writer and last number of the part before
        for writer, first, negative_last, path in found:
            if (writer, first) > covered:
                kept.append(path)
                covered = (writer, -negative_last)
        return kept

    def require_parts(self) -> list[Path]:
        """The verified parts of a store that is not empty.

        Raises:
            FileNotFoundError: nothing was generated yet, or a part was merged meanwhile.
            ValueError: a part is corrupted.
        """
        self.require_some()
        return self.verified_parts()

    def require_some(self) -> None:
        """Raise FileNotFoundError where nothing was generated yet."""
        if not self.parts():
            raise FileNotFoundError(
                f"{self.folder} holds no generations; make them with generate.py first"
            )

    def verified_parts(self) -> list[Path]:
        """:meth:`parts`, each compared with its hash, once on this machine.

        Raises:
            ValueError: one is not what was written.
        """
        parts = self.parts()
        told = {part.name: read_hash(part) for part in parts}
        known = {name: expected for name, expected in told.items() if expected is not None}
        for name in damaged_files(self.folder, known) if known else ():
            raise corrupted(self.folder / name, "it is not what was written")
        return parts

    def drop(self, part: Path) -> None:
        """Delete a part and its hash."""
        part.unlink()
        hash_file(part).unlink(missing_ok=True)

    def append(self, rows: list[Generation], writer: int) -> None:
        """Write ``rows`` as a new part and sync it to the disk.

        Raises:
            OSError: the disk is full; the store is as it was before.
        """
        # One above the highest, not the count: a part that was deleted must not be followed by
        # one that replaces another.
        last = (numbers_of(path)[2] for path in self.folder.glob(f"part-{writer:03d}-*.parquet"))
        number = 1 + max(last, default=-1)
        table = pa.Table.from_pylist([vars(row) for row in rows], SCHEMA)
        self.write_part(self.folder / f"part-{writer:03d}-{number:06d}.parquet", table)

    def write_part(self, path: Path, table: pa.Table) -> None:
        """Write one part atomically."""
        with self.writing(path, table.schema) as writer:
            writer.write_table(table)

    @contextlib.contextmanager
    def writing(self, path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
        """A writer of one part, which is there when the block ends.

        Raises:
            OSError: the disk is full; the store is as it was before.
        """
        with replace_file(path) as unfinished:
            try:
                with pq.ParquetWriter(
                    unfinished, schema, compression="zstd", write_page_checksum=True
                ) as writer:
                    yield writer
                write_hash(path, unfinished)
            except OSError as error:
                raise OSError(
                    f"could not write a part of {self.folder}: {error}; what was written before "
                    "is complete: make room and run the same command again"
                ) from error

    def merge(self, writer: int, count: int) -> None:
        """Replace a writer's small parts by one where there are ``count`` of them.

        The merged part's name tells which numbers it replaces, and from the moment it is there
        those are ignored: wherever this is killed, every row is read once.
        """
        prefix = f"part-{writer:03d}-"
        current = [path for path in self.parts() if path.name.startswith(prefix)]
        replaced = set(self.folder.glob(f"{prefix}*.parquet")) - set(current)
        for path in replaced:  # left by a merge that was killed
            self.drop(path)
        small = [path for path in current if "-" not in path.stem.removeprefix(prefix)]
        if len(small) < count:
            return
        self.verified_parts()
        table = pa.concat_tables([read_part(path, None) for path in small])
        first, last = numbers_of(small[0])[1], numbers_of(small[-1])[2]
        self.write_part(self.folder / f"{prefix}{first:06d}-{last:06d}.parquet", table)
        for path in small:
            self.drop(path)

    def done(self, documents: Sequence[Document]) -> list[set[int]]:
        """Indices that are present of each document, made from the text it has now."""
        places = DocumentPlaces(documents)
        while True:
            present: list[set[int]] = [set() for _ in documents]
            with contextlib.suppress(FileNotFoundError):  # merged since it was listed
                for part in self.verified_parts():
                    keys = read_part(part, ["document_id", "text_hash", "index"])
                    for place, index in zip(
                        places.of(keys).tolist(), keys["index"].to_pylist(), strict=True
                    ):
                        if place >= 0:
                            present[place].add(index)
                return present

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """All generations; a job may be writing meanwhile.

        Raises:
            FileNotFoundError: nothing was generated yet.
            ValueError: a part is corrupted.
        """
        self.require_some()
        while True:
            with contextlib.suppress(FileNotFoundError):  # merged since it was listed
                parts = self.verified_parts()
                return pa.concat_tables([read_part(part, columns) for part in parts])

    def fingerprint(self) -> str:
        """Changes when generations are added, not when parts are merged."""
        rows: dict[int, int] = defaultdict(int)
        times: dict[int, set[float]] = defaultdict(set)
        for part in self.verified_parts():
            writer, footer = numbers_of(part)[0], footer_of(part)
            rows[writer] += footer.num_rows
            for group in range(footer.num_row_groups):
                created = footer.row_group(group).column(SCHEMA.get_field_index("created_at"))
                times[writer] |= {created.statistics.min, created.statistics.max}
        state = [(writer, rows[writer], min(times[writer]), max(times[writer])) for writer in rows]
        return hashlib.sha256(repr(sorted(state)).encode()).hexdigest()[:16]


class DocumentPlaces:
    """Finds the documents that generations were made from, by id and hash of the text.

    Args:
        documents: in corpus order.
    """

    def __init__(self, documents: Sequence[Document]) -> None:
        self.ids = pa.array([document.id for document in documents], pa.string())
        self.hashes = pa.array([document.text_hash for document in documents], pa.string())

    def of(self, rows: pa.Table) -> NDArray[np.int32]:
        """Place of the document of each row: int32 ``[rows]``, -1 where it is gone or was edited.

        Args:
            rows: of a store, with ``document_id`` and ``text_hash``.
        """
        place = pc.index_in(rows["document_id"], self.ids)
        same = pc.equal(pc.take(self.hashes, place), rows["text_hash"])
        # Rows of older versions tell no hash.
        same = pc.if_else(pc.is_null(rows["text_hash"]), True, same)
        place = pc.if_else(same, place, -1)
        found = pc.fill_null(place, -1).combine_chunks()
        return np.array(found.to_numpy(zero_copy_only=False), dtype=np.int32)


def numbers_of(part: Path) -> tuple[int, int, int]:
    """Writer, first and last number of a part from its name."""
    writer, *numbers = (int(piece) for piece in part.stem.split("-")[1:])
    return writer, numbers[0], numbers[-1]


def read_part(part: Path, columns: list[str] | None) -> pa.Table:
    """Read one part.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is corrupted.
    """
    try:
        return pq.read_table(part, columns=columns, schema=SCHEMA, page_checksum_verification=True)
    except FileNotFoundError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise corrupted(part, error) from error


def footer_of(part: Path) -> pq.FileMetaData:
    """How many rows a part has, and what is written with them.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is corrupted.
    """
    try:
        return pq.read_metadata(part)
    except FileNotFoundError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise corrupted(part, error) from error


def batches_of(part: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a part, some at a time.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is corrupted.
    """
    try:
        with pq.ParquetFile(part, page_checksum_verification=True) as file:
            yield from file.iter_batches(BATCH_ROWS, columns=columns)
    except FileNotFoundError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise corrupted(part, error) from error


def by_part(
    rows: NDArray[np.integer[Any]], starts: NDArray[np.integer[Any]]
) -> Iterator[tuple[int, NDArray[np.integer[Any]]]]:
    """The parts that some rows lie in, each with the places of its own in ``rows``.

    Args:
        rows: numbers counted through all parts, in any order: int ``[R]``.
        starts: the first row of each part, and how many there are: int ``[parts + 1]``.

    Yields:
        A part and places, by ascending row.
    """
    order = np.argsort(rows)
    borders = np.searchsorted(rows, starts.astype(rows.dtype), sorter=order).tolist()
    for part, (start, end) in enumerate(itertools.pairwise(borders)):
        if start < end:
            yield part, order[start:end]


def texts_of_part(part: Path, rows: NDArray[np.integer[Any]]) -> list[str]:
    """The texts of some rows of a part, in ascending order of the rows."""
    texts: list[str] = []
    first = 0
    for batch in batches_of(part, ["text"]):
        start, end = np.searchsorted(rows, [first, first + batch.num_rows])
        if end > start:
            texts += batch["text"].take(pa.array(rows[start:end] - first)).to_pylist()
        first += batch.num_rows
    return texts


def corrupted(part: Path, problem: object) -> ValueError:
    """What is wrong with a part, and what to do."""
    return ValueError(
        f"{part} is corrupted ({problem}); delete it and run generate.py again, which makes only "
        "what is missing"
    )


def difference(before: object, after: object, context: int = 30) -> str:
    """How two values differ; of long texts only the surroundings of the first difference."""
    texts = before, after
    if not all(isinstance(text, str) and len(text) > 2 * context for text in texts):
        return f"{before!r} -> {after!r}"
    first, second = str(before), str(after)
    pairs = enumerate(zip(first, second, strict=False))
    shorter = min(len(first), len(second))
    same = next((place for place, (one, other) in pairs if one != other), shorter)
    start = max(0, same - context)
    cut = [text[start : same + context] for text in (first, second)]
    return f"at character {same}: {cut[0]!r} -> {cut[1]!r}"


def owns(document_id: str, writer: int, writers: int) -> bool:
    """Whether a document belongs to this writer: a hash, so any order and any set agrees."""
    digest = hashlib.blake2b(document_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % writers == writer


def drop_leftovers(folder: Path) -> None:
    """Remove temporary files of killed jobs; call it with the lock held."""
    for leftover in folder.glob(".part-*.tmp"):
        os.unlink(leftover)
