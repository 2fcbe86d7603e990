"""Second half of an import: generations find their documents and their numbers, in DuckDB.

Only keys are joined (ids, hashes of texts, places); texts go from the staged files into the parts
of a store as they are numbered, some at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from gen.corpus.documents import Document, hash_text
from gen.exchange.staging import EXAMPLES, SOURCES, Counts, Stage, Unit
from gen.generations.store import SCHEMA, GenerationStore, footer_of, numbers_of

MEMORY = "384MB"  # for DuckDB; beyond it goes to the disk
BATCH_ROWS = 4096
WRITER = 0  # parts of an import are numbered by their units

# What happens to a generation, in the order in which it is blamed.
STATES = """
CREATE OR REPLACE TABLE states AS
WITH matched AS (
    SELECT k.*, d.text_hash AS current, d.split,
        EXISTS (SELECT 1 FROM documents o WHERE o.id = k.document_id) AS known
    FROM keys k LEFT JOIN documents d
        ON d.id = k.document_id AND (k.text_hash IS NULL OR k.text_hash = d.text_hash)
), copies AS (
    SELECT *, row_number() OVER (
        PARTITION BY document_id, current, {identity} ORDER BY unit, place
    ) AS copy
    FROM matched
)
SELECT unit, place, file, row, document_id, current, wanted_index,
    CASE WHEN current IS NULL THEN if(known, 'other_source_text', 'missing_source')
        WHEN copy > 1 THEN 'duplicate'
        WHEN split = 'val' THEN 'held_out'
        ELSE 'kept' END AS state
FROM copies
"""
NUMBERS = """
CREATE OR REPLACE TABLE numbers AS
SELECT unit, place, document_id, current AS text_hash, {index} AS index
FROM states WHERE state = 'kept' ORDER BY unit, place
"""
OWN_INDEX = "wanted_index"
NEXT_INDEX = "row_number() OVER (PARTITION BY document_id ORDER BY unit, place) - 1"
FIRSTS = """
CREATE OR REPLACE TABLE firsts AS
SELECT unit, place FROM (
    SELECT unit, place, row_number() OVER (PARTITION BY document_id ORDER BY unit, place) AS copy
    FROM keys
) WHERE copy = 1 ORDER BY unit, place
"""


@dataclass
class Joined:
    """What became of the generations of one method."""

    generations: int = 0  # stored
    documents: int = 0  # that have any
    highest: int = 0  # G: the most a document has, by index
    without: int = 0  # training documents that have none
    counts: Counts = field(default_factory=Counts)
    parts: dict[str, int] = field(default_factory=dict)  # unit of each part


class Joiner:
    """DuckDB over the staged files, with its database and its spill beside them."""

    def __init__(self, stage: Stage, threads: int) -> None:
        self.stage = stage
        database = stage.folder / "join.duckdb"
        database.unlink(missing_ok=True)  # of a killed attempt
        database.with_name("join.duckdb.wal").unlink(missing_ok=True)
        self.threads = threads
        self.connection = duckdb.connect(
            str(database),
            config={
                "memory_limit": MEMORY,
                "temp_directory": str(stage.folder / "spill"),
                "threads": threads,
                "autoinstall_known_extensions": False,
            },
        )

    def close(self) -> None:
        self.connection.close()

    def keys(self, paths: list[Path], content: bool, index: bool) -> None:
        """The table ``keys`` of some staged files."""
        # Staged files lie in the order of their units, and rows in that of their file.
        self.connection.execute(
            f"""CREATE OR REPLACE TABLE keys AS
            SELECT unit, file_row_number AS place, file, row, document_id, text_hash,
                {"content" if content else "NULL::BIGINT AS content"},
                {"index" if index else "NULL::INTEGER"} AS wanted_index
            FROM read_parquet(?, file_row_number = true)""",
            [[str(path) for path in paths]],
        )

    def first_documents(self) -> Iterator[Document]:
        """Staged documents in the order of the files, of those with one id the first."""
        stage = self.stage
        units = [unit for unit in stage.finished() if has_rows(stage.documents(unit))]
        if not units:
            return
        self.keys([stage.documents(unit) for unit in units], content=False, index=False)
        self.connection.execute(FIRSTS)
        for unit in units:
            places = self.fetch("SELECT place FROM firsts WHERE unit = ? ORDER BY place", unit)
            path, columns = stage.documents(unit), ["document_id", "text", "metadata"]
            for rows, _ in chosen_rows(path, columns, places["place"]):
                for row in rows.to_pylist():
                    metadata = json.loads(row["metadata"])
                    yield Document(row["document_id"], row["text"], metadata)

    def fetch(self, query: str, unit: Unit) -> dict[str, NDArray[Any]]:
        with self.connection.cursor() as cursor:
            return cursor.execute(query, [unit.number]).fetchnumpy()

    def documents(self, root: Path) -> None:
        """The table ``documents``: id, hash of the text and split of the corpus."""
        self.connection.execute(
            "CREATE OR REPLACE TABLE documents (id VARCHAR, text_hash VARCHAR, split VARCHAR)"
        )
        for split in ("train", "val"):
            parquet = pq.ParquetFile(root / "documents" / f"{split}.parquet", pre_buffer=False)
            for batch in parquet.iter_batches(BATCH_ROWS, columns=["id", "text"]):
                hashes = [hash_text(text) for text in batch["text"].to_pylist()]
                rows = pa.table({"id": batch["id"], "text_hash": pa.array(hashes, pa.string())})
                self.connection.register("batch", rows)
                self.connection.execute(
                    "INSERT INTO documents SELECT id, text_hash, ? FROM batch", [split]
                )
                self.connection.unregister("batch")

    def join(self, method: str, store: GenerationStore, row: dict[str, Any], key: str) -> Joined:
        """Number the generations of a method and write them as parts of its store.

        Args:
            method: of the plan.
            store: whose lock is held.
            row: values of the columns that the files do not bring.
            key: identity of files and documents; parts that have it are kept.
        """
        stage = self.stage
        units = [one for one in stage.finished() if one.method == method]
        units = [one for one in units if has_rows(stage.generations(one))]
        joined = Joined()
        for unit in stage.finished():
            if unit.method in (method, SOURCES):
                joined.counts.add(stage.counts(unit))
        drop_other_parts(store, key)
        if not units:
            return joined
        numbered = "index" in stage.plan.layouts[method].carried
        self.keys([stage.generations(unit) for unit in units], content=True, index=numbered)
        identity = "wanted_index" if numbered else "content"
        self.connection.execute(STATES.format(identity=identity))
        self.connection.execute(NUMBERS.format(index=OWN_INDEX if numbered else NEXT_INDEX))
        self.count(joined)

        def write(place: int) -> str | None:
            return self.write_part(method, units[place], place, store, row, key)

        with (
            ThreadPoolExecutor(self.threads) as pool,  # Arrow and DuckDB work without Python's lock
            tqdm(total=len(units), desc=method, unit="part", leave=False) as bar,
        ):
            for unit, name in zip(units, pool.map(write, range(len(units))), strict=True):
                if name is not None:
                    joined.parts[name] = unit.number
                bar.update()
        return joined

    def count(self, joined: Joined) -> None:
        """Totals, and what was left out by reason with the first few of each."""
        ask = self.connection.execute
        totals = ask(
            "SELECT count(*), count(DISTINCT document_id), coalesce(max(index) + 1, 0) FROM numbers"
        ).fetchone()
        assert totals is not None
        joined.generations, joined.documents, joined.highest = totals
        reasons = ask("SELECT state, count(*) FROM states GROUP BY state ORDER BY state").fetchall()
        for state, number in reasons:
            if state == "kept":
                continue
            joined.counts.reasons[state] = number
            rows = ask(
                "SELECT file, row, document_id FROM states WHERE state = ? ORDER BY unit, place "
                f"LIMIT {EXAMPLES}",
                [state],
            ).fetchall()
            joined.counts.examples[state] = [
                f"{self.stage.plan.files[file].path}, row {row}: source {document!r}"
                for file, row, document in rows
            ]
        without = "FROM documents d ANTI JOIN numbers n ON d.id = n.document_id WHERE split='train'"
        found = ask(f"SELECT count(*) {without}").fetchone()
        assert found is not None
        joined.without = found[0]
        if joined.without:
            names = ask(f"SELECT id {without} ORDER BY id LIMIT {EXAMPLES}").fetchall()
            joined.counts.reasons["source_without_generations"] = joined.without
            joined.counts.examples["source_without_generations"] = [name for (name,) in names]

    def write_part(
        self,
        method: str,
        unit: Unit,
        number: int,
        store: GenerationStore,
        row: dict[str, Any],
        key: str,
    ) -> str | None:
        """One staged file as a part; its name, or None where nothing of it is kept."""
        numbers = self.fetch(
            "SELECT place, index, text_hash FROM numbers WHERE unit = ? ORDER BY place", unit
        )
        if not len(numbers["place"]):
            return None
        path = store.folder / f"part-{WRITER:03d}-{number:06d}.parquet"
        if path.exists():  # with the same key: others are gone
            return path.name
        carried = list(self.stage.plan.layouts[method].carried)
        schema = SCHEMA.with_metadata({"import": key})
        columns = list(dict.fromkeys(["document_id", "text", *carried]))
        with store.writing(path, schema) as writer:
            for rows, taken in chosen_rows(self.stage.generations(unit), columns, numbers["place"]):
                given: dict[str, Any] = {
                    name: pa.repeat(pa.scalar(value), rows.num_rows) for name, value in row.items()
                }
                given |= {name: rows[name] for name in columns}
                given["index"] = numbers["index"][taken]
                given["text_hash"] = numbers["text_hash"][taken]
                given["method"] = pa.repeat(method, rows.num_rows)
                if "model" in carried:
                    given["model"] = pc.fill_null(rows["model"], row["model"])
                writer.write_table(table_of(given, schema, rows.num_rows))
        return path.name


def table_of(given: dict[str, Any], schema: pa.Schema, rows: int) -> pa.Table:
    """The given columns in the order and types of a store, the others null."""
    columns = []
    for field_ in schema:
        column = given.get(field_.name)
        if column is None:
            columns.append(pa.nulls(rows, field_.type))
        elif isinstance(column, np.ndarray):
            columns.append(pa.array(column, field_.type))
        else:
            columns.append(column.cast(field_.type))
    return pa.table(columns, schema=schema)


def chosen_rows(
    path: Path, columns: list[str], places: NDArray[np.int64]
) -> Iterator[tuple[pa.Table, slice]]:
    """Rows of a staged file at ascending places, a row group at a time, and which places."""
    parquet = pq.ParquetFile(path, pre_buffer=False)
    start = 0
    for group in range(parquet.num_row_groups):
        end = start + parquet.metadata.row_group(group).num_rows
        first, last = np.searchsorted(places, [start, end])
        if first < last:
            table = parquet.read_row_group(group, columns=columns)
            if last - first < end - start:
                table = table.take(pa.array(places[first:last] - start))
            yield table, slice(first, last)
        start = end


def has_rows(path: Path) -> bool:
    rows: int = pq.read_metadata(path).num_rows
    return rows > 0


def drop_other_parts(store: GenerationStore, key: str) -> None:
    """Remove parts that an import of other files or documents wrote."""
    for path in store.folder.glob("part-*.parquet"):
        metadata = footer_of(path).metadata or {}
        if metadata.get(b"import") != key.encode() or numbers_of(path)[0] != WRITER:
            store.drop(path)
