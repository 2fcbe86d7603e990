"""First half of an import: files are read once, in parallel, into sorted-out rows beside the store.

The plan cuts the files into units. A unit is read by one process and becomes one or two Parquet
files and, last, a JSON file with its counts; a unit that has the latter is finished, so a killed
import goes on with those that lack it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from gen.exchange.config import ImportConfig
from gen.exchange.files import (
    Odd,
    SourceFile,
    find_files,
    read_rows,
    row_groups,
    schema_names,
    sha256_of,
)
from gen.exchange.rows import Layout, Row, generation_layout, read_row, source_layout
from gen.generations.store import SCHEMA
from trainer.data.format import damaged_files
from trainer.files import optional, read_sealed, replace_file, sha256, write_sealed

logger = logging.getLogger(__name__)

VERSION = 2  # of the staged files; a change reads again
UNIT_BYTES = 128 << 20  # of source, about: what one process reads at a time
COMPRESSED = 4  # times larger than it is on the disk, about
FLUSH_BYTES = 8 << 20  # of text in memory until it is written
FIRST_ROWS = 20  # of a set of files, in which its columns must occur
EXAMPLES = 5  # of each reason that are named
SOURCES = ""  # stands for a method where rows are sources alone

KEYS = [
    ("unit", pa.int32()),
    ("file", pa.int32()),
    ("row", pa.int64()),
    ("document_id", pa.string()),
    ("text_hash", pa.string()),
]
DOCUMENTS = pa.schema([*KEYS, ("text", pa.large_string()), ("metadata", pa.large_string())])


@dataclass(frozen=True)
class Piece:
    """Some row groups of a file, or (None) all of it."""

    file: int
    groups: list[int] | None = None

    @property
    def is_first(self) -> bool:
        return self.groups is None or 0 in self.groups


@dataclass(frozen=True)
class Unit:
    """What one process reads at a time."""

    number: int
    method: str  # or SOURCES
    pieces: list[Piece]
    bytes: int  # about


@dataclass(frozen=True)
class Plan:
    """Files, units and where in their rows everything stands."""

    files: list[SourceFile]
    units: list[Unit]
    layouts: dict[str, Layout]
    with_documents: bool
    max_documents: int | None
    settings: dict[str, Any]  # that decide what is imported

    @property
    def methods(self) -> list[str]:
        return [method for method in self.layouts if method != SOURCES]

    @property
    def identity(self) -> str:
        """Hash of what the staged files hold; another one reads again."""
        content = {
            "version": VERSION,
            "files": [asdict(file) for file in self.files],
            "settings": self.settings,
            "with_documents": self.with_documents,
            "max_documents": self.max_documents,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Counts:
    """What a unit, or all of them, held."""

    rows: int = 0
    sources: int = 0
    generations: int = 0
    characters: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)  # file, row, detail
    sha256: dict[str, str] = field(default_factory=dict)  # by file number
    file_rows: dict[str, int] = field(default_factory=dict)  # by file number

    def note(self, reason: str, example: str) -> None:
        """Count one odd thing; the first few are named."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        named = self.examples.setdefault(reason, [])
        if len(named) < EXAMPLES:
            named.append(example)

    def add(self, other: Counts) -> None:
        """Add those of a later unit."""
        for name in ("rows", "sources", "generations", "characters"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.reasons = dict(Counter(self.reasons) + Counter(other.reasons))
        for reason, named in other.examples.items():
            self.examples[reason] = (self.examples.get(reason, []) + named)[:EXAMPLES]
        self.sha256 |= other.sha256
        self.file_rows = dict(Counter(self.file_rows) + Counter(other.file_rows))


def make_plan(
    config: ImportConfig, method: str, with_documents: bool, max_documents: int | None
) -> Plan:
    """Find the files, look at the first row of each set, and cut them into units.

    Args:
        config: places and columns.
        method: name of the generations where ``config.methods`` is empty.
        with_documents: whether the corpus is made of the same files.
        max_documents: no more units than hold so many sources; None: all.

    Raises:
        FileNotFoundError: a place holds no files.
        ValueError: a column is missing, or no row can be read.
    """
    config.check()
    assert config.path is not None
    if with_documents and config.text_column is None and config.sources is None:
        raise ValueError(
            "corpus=import needs the sources' texts: set import.text_column to their column, or "
            "import.sources to the files that hold them"
        )
    places = {
        name: (f"{config.path.rstrip('/')}/{below}", f"import.methods.{name}")
        for name, below in config.methods.items()
        if not config.only or name in config.only
    } or {method: (config.path, "import.path")}
    if with_documents and config.sources is not None:
        places = {SOURCES: (config.sources, "import.sources"), **places}
    files: list[SourceFile] = []
    units: list[Unit] = []
    layouts: dict[str, Layout] = {}
    for name, (place, setting) in places.items():
        found = find_files(place, setting)
        columns, where = first_columns(found)
        layouts[name] = (
            source_layout(config, columns, where)
            if name == SOURCES
            else generation_layout(config, columns, where)
        )
        for group in grouped(found, len(files)):
            units.append(Unit(len(units), name, group[0], group[1]))
        files += found
    settings = asdict(config)
    for name in ("processes", "only", "model", "licence"):
        settings.pop(name)
    settings["methods"] = {name: place for name, (place, _) in places.items()}
    return Plan(files, units, layouts, with_documents, max_documents, settings)


def first_columns(files: list[SourceFile]) -> tuple[list[str], str]:
    """Columns of the first rows that can be read, and the file they are in."""
    problem = "they are empty"
    for file in files:
        columns: dict[str, None] = {}
        for _, row in itertools.islice(read_rows(file.path, schema_names(file.path)), FIRST_ROWS):
            if isinstance(row, Odd):
                problem = row.detail
            else:
                columns |= dict.fromkeys(row)
        if columns:
            return list(columns), file.path
    raise ValueError(f"no row of {files[0].path} and what lies beside it can be read: {problem}")


def grouped(files: list[SourceFile], first: int) -> Iterator[tuple[list[Piece], int]]:
    """Pieces of about :data:`UNIT_BYTES` each, in the order of the files."""
    pieces: list[Piece] = []
    size = 0
    for number, file in enumerate(files, first):
        groups = row_groups(file)
        if groups is None:
            plain = file.path.endswith((".jsonl", ".json", ".ndjson", ".arrow", ".parquet"))
            pieces.append(Piece(number))
            size += file.size * (1 if plain else COMPRESSED)
        else:
            chosen: list[int] = []
            for group, (_, group_bytes) in enumerate(groups):
                chosen.append(group)
                size += group_bytes
                if size >= UNIT_BYTES and group < len(groups) - 1:
                    yield [*pieces, Piece(number, chosen)], size
                    pieces, chosen, size = [], [], 0
            pieces.append(Piece(number, chosen))
        if size >= UNIT_BYTES:
            yield pieces, size
            pieces, size = [], 0
    if pieces:
        yield pieces, size


class Stage:
    """The folder in which a plan is carried out."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder = folder
        self.plan = plan
        self.whole: set[int] = set()  # numbers of units that were read or verified by this process

    def prepare(self) -> None:
        """Make the folder; what another plan left in it is removed."""
        marker = self.folder / "plan.json"
        found = optional(marker, read_sealed) or {}
        if marker.exists() and found.get("identity") != self.plan.identity:
            logger.info(f"{self.folder}: files or settings changed; reading begins anew")
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not marker.exists():
            write_sealed(marker, {"identity": self.plan.identity})

    def documents(self, unit: Unit) -> Path:
        return self.folder / f"documents-{unit.number:06d}.parquet"

    def generations(self, unit: Unit) -> Path:
        return self.folder / f"generations-{unit.number:06d}.parquet"

    def counts_path(self, unit: Unit) -> Path:
        return self.folder / f"counts-{unit.number:06d}.json"

    def counts(self, unit: Unit) -> Counts:
        return Counts(**read_sealed(self.counts_path(unit))["counts"])

    def finished(self) -> list[Unit]:
        """Units that are read, in the order of the plan."""
        return [unit for unit in self.plan.units if self.counts_path(unit).exists()]

    def is_whole(self, unit: Unit) -> bool:
        """Whether what an earlier process read is what it wrote; damage is said."""
        if unit.number not in self.whole:
            try:
                files = read_sealed(self.counts_path(unit))["files"]
                damaged = damaged_files(self.folder, files)
            except (ValueError, OSError) as error:
                logger.warning(f"{error}; its files are read again")
                return False
            if damaged:
                logger.warning(f"{self.folder / min(damaged)} is damaged; its files are read again")
                return False
            self.whole.add(unit.number)
        return True

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, processes: int | None, methods: list[str] | None = None) -> None:
        """Read every unit (None: of all methods, and of sources) not finished, in parallel.

        Raises:
            OSError: the disk is full; what is finished stays.
        """
        self.prepare()
        finished = {unit.number for unit in self.finished() if self.is_whole(unit)}
        missing = [
            unit
            for unit in self.plan.units
            if unit.number not in finished and (methods is None or unit.method in methods)
        ]
        if not missing:
            return
        total = sum(unit.bytes for unit in self.plan.units)
        # Little is read before another process has started.
        enough = processes or min(os.cpu_count() or 1, 1 + total // UNIT_BYTES)
        count = min(enough, len(missing))
        with tqdm(total=total, desc="reading", unit="B", unit_scale=True, leave=False) as bar:
            bar.update(total - sum(unit.bytes for unit in missing))
            if count == 1:
                for unit in missing:
                    if self.is_wanted(unit):
                        read_unit(self, unit)
                        self.whole.add(unit.number)
                    bar.update(unit.bytes)
                return
            # Not forked: threads of Arrow may hold locks here.
            with ProcessPoolExecutor(
                count, get_context("spawn"), initializer=die_with, initargs=(os.getpid(),)
            ) as pool:
                try:
                    self.feed(pool, missing, 2 * count, bar)
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise

    def feed(self, pool: ProcessPoolExecutor, missing: list[Unit], ahead: int, bar: tqdm) -> None:
        """Give units to the pool, few at a time: sources may turn out to be enough."""
        running: dict[Future[None], Unit] = {}
        for unit in missing:
            while len(running) >= ahead:
                self.collect(running, bar)
            if self.is_wanted(unit):
                running[pool.submit(read_unit, self, unit)] = unit
            else:
                bar.update(unit.bytes)
        while running:
            self.collect(running, bar)

    def collect(self, running: dict[Future[None], Unit], bar: tqdm) -> None:
        """Wait for one unit or more."""
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            unit = running.pop(future)
            bar.update(unit.bytes)
            future.result()
            self.whole.add(unit.number)

    def is_wanted(self, unit: Unit) -> bool:
        """False where the units before it, all finished, hold ``max_documents`` sources."""
        if self.plan.max_documents is None or self.plan.layouts[unit.method].text is None:
            return True
        sources = 0
        for earlier in self.plan.units[: unit.number]:
            if earlier.method == unit.method:
                if not self.counts_path(earlier).exists():
                    return True
                sources += self.counts(earlier).sources
                if sources >= self.plan.max_documents:
                    return False
        return True


def die_with(parent: int) -> None:
    """End this process when the one that started it is gone, however that went."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Sink:
    """Rows of one kind on their way into a Parquet file, few in memory."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.schema = schema
        # Read once and deleted: what is quick to write matters, not what is small.
        self.writer = pq.ParquetWriter(path, schema, compression="lz4", use_dictionary=False)
        self.columns: dict[str, list[Any]] = defaultdict(list)
        self.size = 0

    def add(self, values: dict[str, Any], size: int) -> None:
        for name in self.schema.names:
            self.columns[name].append(values[name])
        self.size += size
        if self.size >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        if self.columns:
            self.writer.write_table(pa.Table.from_pydict(dict(self.columns), self.schema))
        self.columns.clear()
        self.size = 0

    def close(self) -> None:
        self.flush()
        self.writer.close()


def generation_schema(layout: Layout) -> pa.Schema:
    """Of staged generations."""
    carried = [SCHEMA.field(name) for name in layout.carried]
    return pa.schema(
        [
            *KEYS,
            ("content", pa.int64()),
            *((column.name, column.type) for column in carried),
            ("text", pa.large_string()),
        ]
    )


def read_unit(stage: Stage, unit: Unit) -> None:
    """Read one unit into its staged files; the counts are written last."""
    plan, layout = stage.plan, stage.plan.layouts[unit.method]
    counts = Counts()
    with (
        replace_file(stage.documents(unit)) as documents_path,
        replace_file(stage.generations(unit)) as generations_path,
    ):
        documents = Sink(documents_path, DOCUMENTS)
        generations = Sink(generations_path, generation_schema(layout))
        for piece in unit.pieces:
            file = plan.files[piece.file]
            if piece.is_first and "://" not in file.path:
                counts.sha256[str(piece.file)] = sha256_of(file.path)
            for number, row in read_rows(file.path, layout.columns, piece.groups):
                where = f"{file.path}, row {number}" if number else file.path
                if isinstance(row, Odd):
                    counts.note(row.reason, f"{where}: {row.detail}")
                    continue
                counts.rows += 1
                counts.file_rows[str(piece.file)] = counts.file_rows.get(str(piece.file), 0) + 1
                read = read_row(row, layout)
                for reason, detail in read.odd:
                    counts.note(reason, f"{where}: {detail}")
                keys = {"unit": unit.number, "file": piece.file, "row": number}
                stage_row(read, keys, plan.with_documents, documents, generations, counts)
        documents.close()
        generations.close()
    files = [stage.documents(unit), stage.generations(unit)]
    hashes = {file.name: sha256(file) for file in files}
    write_sealed(stage.counts_path(unit), {"counts": asdict(counts), "files": hashes})


def stage_row(
    read: Row,
    keys: dict[str, int],
    with_documents: bool,
    documents: Sink,
    generations: Sink,
    counts: Counts,
) -> None:
    """Write what a row holds."""
    if read.document_id is None:
        return
    source = {**keys, "document_id": read.document_id, "text_hash": read.text_hash}
    if read.text is not None:
        counts.sources += 1
        counts.characters += len(read.text)
        if with_documents:
            values = {**source, "text": read.text, "metadata": read.metadata}
            documents.add(values, len(read.text))
    for generation in read.generations:
        counts.generations += 1
        counts.characters += len(generation["text"])
        generations.add({**source, **generation}, len(generation["text"]))
