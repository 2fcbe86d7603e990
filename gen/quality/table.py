"""Measures of all generations of a store, made once for each state of it and kept beside it."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import fields
from multiprocessing import get_context
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from gen.corpus.documents import Document
from gen.generations.by_document import KEY_COLUMNS
from gen.generations.store import (
    DocumentPlaces,
    GenerationStore,
    read_part,
    texts_of_part,
)
from gen.quality.gates import Measures, measure
from trainer.files import is_whole, only_one, replace_file, write_hash

VERSION = 1  # of the measures; a change measures again
ROWS_A_PROCESS = 5000  # fewer are measured before another process has started
GROUP = 16  # documents sent to a process at once

CHUNK_ROWS = 1 << 16  # generations whose texts are in memory at once
TYPES = {"int": pa.int32(), "bool": pa.bool_(), "float": pa.float32()}
SCHEMA = pa.schema(
    [("document_id", pa.string())]
    + [(field.name, TYPES[str(field.type)]) for field in fields(Measures)]
)

Group = list[tuple[str, str, list[tuple[int, str, str]]]]  # document id, text, siblings


def quality_table(
    store: GenerationStore,
    documents: list[Document],
    documents_hash: str,
    processes: int | None = None,
) -> pa.Table:
    """``document_id`` and the :class:`Measures` of every generation of ``documents``.

    The table is kept in the store's folder and made again when generations were added, the
    documents changed, or the measures did.

    Args:
        store: the generations.
        documents: their sources.
        documents_hash: identity of those documents.
        processes: that measure; None: all cores for a large store.
    """
    identity = f"{VERSION}/{store.fingerprint()}/{documents_hash}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    path = store.folder / "quality.parquet"
    with only_one(store.folder / "quality.lock"):  # several writers may build the streams
        if path.exists() and is_whole(path):
            with contextlib.suppress(pa.ArrowException, OSError):  # damaged: measured again
                schema = pq.read_schema(path)
                if (schema.metadata or {}).get(b"key") == key.encode():
                    return pq.read_table(path, page_checksum_verification=True)
        table = measure_all(store, documents, processes)
        table = table.replace_schema_metadata({"key": key})
        with replace_file(path) as unfinished:
            pq.write_table(table, unfinished, compression="zstd", write_page_checksum=True)
            write_hash(path, unfinished)
        return table


def measure_all(
    store: GenerationStore, documents: list[Document], processes: int | None
) -> pa.Table:
    """Measure every generation, in corpus order and ascending index, some thousands at a time."""
    rows = StoredRows(store, documents)
    if processes is None:
        processes = min(os.cpu_count() or 1, 1 + len(rows.order) // ROWS_A_PROCESS)
    tables = [pa.table([pa.array([], kind) for kind in SCHEMA.types], SCHEMA)]
    with (
        tqdm(total=len(rows.order), desc="quality", unit="text", leave=False) as bar,
        # Not forked: threads of a server or of BLAS may hold locks here.
        ProcessPoolExecutor(processes, get_context("spawn"))
        if processes > 1
        else contextlib.nullcontext() as pool,
    ):
        for chunk in rows.chunks():
            groups = grouped(rows, chunk, documents)
            if pool is None:
                tables.append(collect(map(measure_group, groups)))
            else:
                tables.append(collect(measured_by(pool, groups, 4 * processes)))
            bar.update(len(chunk))
    return pa.concat_tables(tables)


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
        self.order = order[np.searchsorted(self.place[order], 0) :]

    def chunks(self) -> Iterator[NDArray[np.integer[Any]]]:
        """Rows of whole documents, so many that their texts fit into memory."""
        place = self.place[self.order]
        start = 0
        while start < len(place):
            last = place[min(start + CHUNK_ROWS, len(place)) - 1]
            end = int(np.searchsorted(place, last, "right"))
            yield self.order[start:end]
            start = end

    def texts(self, rows: NDArray[np.integer[Any]]) -> dict[int, str]:
        """The texts of some rows, a part after the other."""
        found: dict[int, str] = {}
        rows = np.sort(rows)
        borders = np.searchsorted(rows, self.part_starts).tolist()
        for part, (start, end) in enumerate(itertools.pairwise(borders)):
            if start < end:
                own = rows[start:end]
                texts = texts_of_part(self.parts[part], own - self.part_starts[part])
                found.update(zip(own.tolist(), texts, strict=True))
        return found


def grouped(
    rows: StoredRows, chunk: NDArray[np.integer[Any]], documents: list[Document]
) -> Iterator[Group]:
    """Documents with their generations, some at a time."""
    texts = rows.texts(chunk)

    def one(own: Iterator[int], of: int) -> tuple[str, str, list[tuple[int, str, str]]]:
        siblings = [
            (int(rows.index[row]), texts.pop(row), "length" if rows.cut[row] else "stop")
            for row in own
        ]
        return documents[of].id, documents[of].text, siblings

    by_document = itertools.groupby(chunk.tolist(), key=lambda row: int(rows.place[row]))
    each = (one(own, of) for of, own in by_document)
    while group := list(itertools.islice(each, GROUP)):
        yield group


def measure_group(group: Group) -> list[tuple[str, list[Measures]]]:
    """Measures by document."""
    return [(document, measure(source, siblings)) for document, source, siblings in group]


def measured_by(
    pool: ProcessPoolExecutor, groups: Iterator[Group], ahead: int
) -> Iterator[list[tuple[str, list[Measures]]]]:
    """Results in order, with few groups in memory: a pool's own ``map`` takes all at once."""
    running: deque[Future[list[tuple[str, list[Measures]]]]] = deque()
    for group in groups:
        running.append(pool.submit(measure_group, group))
        if len(running) >= ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def collect(results: Iterator[list[tuple[str, list[Measures]]]]) -> pa.Table:
    """Measured groups as rows of the table."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for group in results:
        for document, measured in group:
            for measures in measured:
                columns["document_id"].append(document)
                for name in SCHEMA.names[1:]:
                    columns[name].append(getattr(measures, name))
    return pa.table(columns, SCHEMA)


def columns_of(table: pa.Table) -> dict[str, NDArray[Any]]:
    """The measures as arrays."""
    return {
        field.name: table[field.name].to_numpy(zero_copy_only=False) for field in fields(Measures)
    }
