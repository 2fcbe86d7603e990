"""Measures of all generations of a store, made once for each state of it and kept beside it."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, fields
from multiprocessing import get_context
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from gen.corpus.documents import Document
from gen.generations.by_document import TEXT_COLUMNS
from gen.generations.store import GenerationStore, places_of
from gen.quality.gates import Measures, measure
from trainer.files import is_whole, only_one, replace_file, write_hash

VERSION = 1  # of the measures; a change measures again
ROWS_A_PROCESS = 5000  # fewer are measured before another process has started
GROUP = 16  # documents sent to a process at once

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
    """Measure every generation, in corpus order and ascending index."""
    generations = store.read([*TEXT_COLUMNS, "finish_reason"])
    if processes is None:
        processes = min(os.cpu_count() or 1, 1 + generations.num_rows // ROWS_A_PROCESS)
    groups = grouped(generations, documents)
    columns: dict[str, list[Any]] = {"document_id": []} | {
        field.name: [] for field in fields(Measures)
    }
    with tqdm(total=len(documents), desc="quality", unit="doc", leave=False) as bar:
        if processes == 1:
            collect(map(measure_group, groups), columns, bar)
        else:
            # Not forked: threads of a server or of BLAS may hold locks here.
            with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
                collect(measured_by(pool, groups, 4 * processes), columns, bar)
    types = {int: pa.int32(), bool: pa.bool_(), float: pa.float32()}
    arrays = {"document_id": pa.array(columns["document_id"], pa.string())}
    for field in fields(Measures):
        kind = {"int": int, "bool": bool, "float": float}[str(field.type)]
        arrays[field.name] = pa.array(columns[field.name], types[kind])
    return pa.table(arrays)


def grouped(generations: pa.Table, documents: list[Document]) -> Iterator[Group]:
    """Documents with their generations, some at a time."""
    place = places_of(generations, documents)
    index = generations["index"].to_numpy()
    order = np.lexsort((index, place))
    order = order[np.searchsorted(place[order], 0) :]  # those of other texts are first
    texts, reasons = generations["text"], generations["finish_reason"]

    def one(rows: Iterator[int], of: int) -> tuple[str, str, list[tuple[int, str, str]]]:
        siblings = [(int(index[row]), texts[row].as_py(), reasons[row].as_py()) for row in rows]
        return documents[of].id, documents[of].text, siblings

    by_document = itertools.groupby(order.tolist(), key=lambda row: int(place[row]))
    each = (one(rows, of) for of, rows in by_document)
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


def collect(
    results: Iterator[list[tuple[str, list[Measures]]]], columns: dict[str, list[Any]], bar: tqdm
) -> None:
    """Append measured groups to the table's columns."""
    for group in results:
        for document, measured in group:
            for measures in measured:
                columns["document_id"].append(document)
                for name, value in asdict(measures).items():
                    columns[name].append(value)
        bar.update(len(group))


def columns_of(table: pa.Table) -> dict[str, NDArray[Any]]:
    """The measures as arrays."""
    return {
        field.name: table[field.name].to_numpy(zero_copy_only=False) for field in fields(Measures)
    }
