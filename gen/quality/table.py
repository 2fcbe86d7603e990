"""Measures of all generations of a store, made once for each state of it and kept beside it.

They are measured in units of some thousand generations, each by whichever process on whichever
machine has a core free (``gen/work.py``), and joined when all are there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gen.corpus.documents import Document
from gen.generations.by_document import KEY_COLUMNS
from gen.generations.store import (
    DocumentPlaces,
    GenerationStore,
    by_part,
    read_part,
    texts_of_part,
)
from gen.quality.gates import Measures, measure
from gen.work import Unit, Work
from trainer.files import is_whole, only_one, replace_file, write_hash

VERSION = 1  # of the measures; a change measures again
ROWS_A_PROCESS = 5000  # fewer are measured before another process has started
UNIT_ROWS = 1 << 12, 1 << 15  # generations of a unit at least and at most
UNITS = 64  # of a store, as far as these bounds allow
ATTEMPTS = 3  # where units are found to be damaged

TYPES = {"int": pa.int32(), "bool": pa.bool_(), "float": pa.float32()}
NAMES = [field.name for field in fields(Measures)]
SCHEMA = pa.schema(
    [("document_id", pa.string())]
    + [(field.name, TYPES[str(field.type)]) for field in fields(Measures)]
)


def quality_table(
    store: GenerationStore,
    documents: list[Document],
    documents_hash: str,
    processes: int | None = None,
    work: Work | None = None,
    with_documents: bool = False,
) -> pa.Table:
    """The :class:`Measures` of every generation of ``documents``, by document, then by index.

    The table is kept in the store's folder and made again when generations were added, the
    documents changed, or the measures did.

    Args:
        store: the generations.
        documents: their sources.
        documents_hash: identity of those documents.
        processes: that measure; None: those of ``work``, or all cores.
        work: shares it with other machines; None: this process and its children alone.
        with_documents: tell the ``document_id`` of each as well, which takes as much memory again.
    """
    identity = f"{VERSION}/{store.fingerprint()}/{documents_hash}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    table = Table(store, key)
    names = SCHEMA.names if with_documents else NAMES
    if (found := table.read(names)) is not None:
        return found
    if work is not None and processes is None:
        table.make(documents, work)
    else:
        shares = (work.writer, work.writers) if work is not None else (0, 1)
        with Work(processes, *shares) as own:
            table.make(documents, own)
    found = table.read(names)
    if found is None:
        raise OSError(
            f"{table.path} was damaged as soon as it was written, or {store.folder} grew "
            "meanwhile: run the same command again"
        )
    return found


class Table:
    """The measures of a store, in one file that is joined from those of the units.

    Args:
        store: the generations.
        key: what they and their documents are, and how they are measured.
    """

    def __init__(self, store: GenerationStore, key: str) -> None:
        self.store = store
        self.key = key
        self.path = store.folder / "quality.parquet"
        self.building = store.folder / f".quality.{key}.building"

    def is_made(self) -> bool:
        """Whether the file is there and of this key; whole or not."""
        with contextlib.suppress(pa.ArrowException, OSError):
            metadata: dict[bytes, bytes] = pq.read_schema(self.path).metadata or {}
            return metadata.get(b"key") == self.key.encode()
        return False

    def read(self, names: list[str]) -> pa.Table | None:
        """What the file holds; None where it is not there, damaged, or of another key."""
        with contextlib.suppress(pa.ArrowException, OSError):
            if self.is_made() and is_whole(self.path):
                return pq.read_table(self.path, columns=names, page_checksum_verification=True)
            if self.is_made():
                self.path.unlink()
        return None

    def unit(self, number: int) -> Path:
        return self.building / f"{number:05d}.parquet"

    def make(self, documents: list[Document], work: Work) -> None:
        """Measure what is not measured, with whoever else does it, and join it.

        Raises:
            OSError: the disk is full, or fails.
        """
        rows = StoredRows(self.store, documents)
        chunks = list(rows.chunks())
        try:
            for _ in range(ATTEMPTS):
                self.measure(chunks, rows, documents, work)
                with only_one(self.store.folder / "quality.lock"):
                    if self.is_made() or self.join(len(chunks)):
                        break
        except FileNotFoundError:
            # Another writer has joined all, and takes away what it was joined of.
            if not self.is_made():
                raise
        for other in self.store.folder.glob(f".quality.{'?' * 16}.building"):
            shutil.rmtree(other, ignore_errors=True)  # of other states as well

    def measure(
        self,
        chunks: list[NDArray[np.integer[Any]]],
        rows: StoredRows,
        documents: list[Document],
        work: Work,
    ) -> None:
        """Measure the units that are not there."""
        units = [
            Unit(
                f"{number:05d}",
                len(chunk),
                functools.partial(self.prepare, number, chunk, rows, documents),
            )
            for number, chunk in enumerate(chunks)
            if not self.unit(number).exists()
        ]
        label = f"{self.store.folder.name}: judging"
        work.run(units, self.building / "locks", label, "texts", ROWS_A_PROCESS)

    def prepare(
        self,
        number: int,
        chunk: NDArray[np.integer[Any]],
        rows: StoredRows,
        documents: list[Document],
    ) -> Callable[[], None]:
        """What a process is given to measure one unit."""
        return functools.partial(measure_unit, self, self.unit(number), rows.some(chunk, documents))

    def join(self, units: int) -> bool:
        """Write the file from all units; False where one is damaged or gone, and to be made anew.

        Raises:
            OSError: the disk is full.
        """
        for unit in map(self.unit, range(units)):
            if not unit.exists() or not is_whole(unit):
                unit.unlink(missing_ok=True)
                return False
        schema = SCHEMA.with_metadata({"key": self.key})
        with replace_file(self.path) as unfinished:
            with pq.ParquetWriter(
                unfinished, schema, compression="zstd", write_page_checksum=True
            ) as writer:
                for unit in map(self.unit, range(units)):
                    writer.write_table(pq.read_table(unit, schema=schema))
            write_hash(self.path, unfinished)
        return True


@dataclass(frozen=True)
class Rows:
    """Some generations of documents that follow each other, as a process is given them."""

    documents: list[tuple[str, str]]  # id and text
    counts: list[int]  # generations of each
    index: list[int]  # of each generation
    cut: list[bool]  # off by its length limit
    places: list[tuple[Path, NDArray[np.integer[Any]], NDArray[np.integer[Any]]]]
    # of each part: its rows, ascending, and which generation each of them is

    def texts(self) -> list[str]:
        """Of each generation."""
        found = [""] * len(self.index)
        for part, rows, numbers in self.places:
            for number, text in zip(numbers.tolist(), texts_of_part(part, rows), strict=True):
                found[number] = text
        return found


class StoredRows:
    """The generations of some documents by document and index, whose texts are read when needed.

    Args:
        store: of the generations.
        documents: in corpus order.
    """

    def __init__(self, store: GenerationStore, documents: list[Document]) -> None:
        places = DocumentPlaces(documents)
        self.parts = store.require_parts()
        place, index, cut = [], [], []
        for part in self.parts:
            table = read_part(part, [*KEY_COLUMNS, "finish_reason"])
            place.append(places.of(table))
            index.append(table["index"].to_numpy())
            length = pc.equal(table["finish_reason"], "length")
            cut.append(pc.fill_null(length, False).to_numpy(zero_copy_only=False))
        self.part_starts = np.cumsum([0, *map(len, place)])
        self.place = np.concatenate(place)
        self.index = np.concatenate(index)
        self.cut = np.concatenate(cut)
        order = np.lexsort((self.index, self.place))
        # Those of other texts are first.
        self.order = order[np.searchsorted(self.place[order], 0) :].astype(np.int32)

    def chunks(self) -> Iterator[NDArray[np.integer[Any]]]:
        """Rows of whole documents, so many that their texts fit into memory."""
        least, most = UNIT_ROWS
        size = min(max(len(self.order) // UNITS, least), most)
        place = self.place[self.order]
        start = 0
        while start < len(place):
            last = place[min(start + size, len(place)) - 1]
            end = int(np.searchsorted(place, last, "right"))
            yield self.order[start:end]
            start = end

    def by_part(
        self, rows: NDArray[np.integer[Any]]
    ) -> Iterator[tuple[Path, NDArray[np.integer[Any]], NDArray[np.integer[Any]]]]:
        """Rows in each part, ascending, and where each of them stands in ``rows``."""
        for part, own in by_part(rows, self.part_starts):
            yield self.parts[part], rows[own] - self.part_starts[part], own

    def texts(self, rows: NDArray[np.integer[Any]]) -> dict[int, str]:
        """The texts of some rows, a part after the other."""
        found: dict[int, str] = {}
        for part, within, own in self.by_part(rows):
            found.update(zip(rows[own].tolist(), texts_of_part(part, within), strict=True))
        return found

    def some(self, chunk: NDArray[np.integer[Any]], documents: list[Document]) -> Rows:
        """What a process is given of some rows, by document and index."""
        of, counts = np.unique(self.place[chunk], return_counts=True)
        return Rows(
            [(documents[place].id, documents[place].text) for place in of.tolist()],
            counts.tolist(),
            self.index[chunk].tolist(),
            self.cut[chunk].tolist(),
            list(self.by_part(chunk)),
        )


def measure_unit(table: Table, path: Path, rows: Rows) -> None:
    """Measure some generations, unless another writer has since, or has joined all."""
    if path.exists() or table.is_made():
        return
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    siblings = zip(rows.index, rows.texts(), rows.cut, strict=True)
    for (document, source), count in zip(rows.documents, rows.counts, strict=True):
        own = [
            (index, text, "length" if cut else "stop")
            for index, text, cut in itertools.islice(siblings, count)
        ]
        for measures in measure(source, own):
            columns["document_id"].append(document)
            for name in NAMES:
                columns[name].append(getattr(measures, name))
    with replace_file(path) as unfinished:
        pq.write_table(
            pa.table(columns, SCHEMA), unfinished, compression="zstd", write_page_checksum=True
        )
        write_hash(path, unfinished)


def columns_of(table: pa.Table) -> dict[str, NDArray[Any]]:
    """The measures as arrays."""
    return {name: table[name].to_numpy(zero_copy_only=False) for name in NAMES}
