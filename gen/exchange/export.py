"""``generate.py export=FOLDER``: documents with their generations, and megadocs, for others.

The folder is a dataset that ``datasets.load_dataset`` opens: one config a method with the splits
``train`` and ``held_out``, one a synthetic stream, and a card. ``import=megadocs`` takes it back.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tokenizers import Tokenizer
from tqdm import tqdm

from gen.corpus.documents import Document, hash_of, hash_text
from gen.corpus.near_duplicates import left_out
from gen.corpus.tokenizer import TokenizerManifest
from gen.exchange.card import Part, write_card
from gen.exchange.join import MEMORY
from gen.generations.store import SCHEMA, GenerationStore
from gen.megadocs.assembly import Megadoc, with_texts
from gen.megadocs.config import StreamConfig
from gen.megadocs.selection import choose_generations
from gen.megadocs.streams import lay_out
from gen.megadocs.tokens import starts_of
from gen.quality.gates import QualityConfig, gates
from gen.quality.table import columns_of, quality_table
from trainer.data.format import REAL, SYNTHETIC, THOUGHT, read_manifest
from trainer.files import replace_folder, write_json

SHARD_BYTES = 256 << 20  # of text in one file
BATCH_ROWS = 1024
KINDS = ("real", "rephrase", "thought")
SPLITS = {"train": "train", "val": "held_out"}  # of the corpus folder -> of the dataset

GENERATION = pa.struct(
    [column for column in SCHEMA if column.name not in ("document_id", "method", "text_hash")]
)
ROWS = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.large_string()),
        ("metadata", pa.string()),  # JSON
        ("generations", pa.list_(GENERATION)),
    ]
)
MEGADOCS = pa.schema(
    [
        ("id", pa.string()),
        ("document_id", pa.string()),
        ("text", pa.large_string()),
        ("member_ends", pa.list_(pa.int64())),  # characters, cumulative, separators included
        ("member_kinds", pa.list_(pa.string())),
        ("member_methods", pa.list_(pa.string())),  # null for real text
        ("member_indices", pa.list_(pa.int32())),
    ]
)
JOINED = """
SELECT k.place, g.* FROM generations g JOIN keys k
    ON g.document_id = k.id AND (g.text_hash IS NULL OR g.text_hash = k.text_hash)
WHERE k.split = ? ORDER BY k.place, g.index
"""


@dataclass
class Shards:
    """Parquet files of one split, a new one where the last is large enough."""

    folder: Path
    split: str
    schema: pa.Schema
    written: int = 0  # bytes of text in the present file
    files: int = 0
    writer: pq.ParquetWriter | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: dict[str, Any], size: int) -> None:
        """Add a row of ``size`` bytes of text; full files are closed."""
        self.rows.append(row)
        self.written += size
        if len(self.rows) == BATCH_ROWS or self.written >= SHARD_BYTES:
            self.flush()
        if self.written >= SHARD_BYTES:
            self.close()

    def flush(self) -> None:
        """Write the rows that wait, to a new file where none is open."""
        if self.writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{self.split}-{self.files:05d}.parquet"
            self.writer = pq.ParquetWriter(path, self.schema, compression="zstd")
            self.files += 1
            self.written = 0
        self.writer.write_table(pa.Table.from_pylist(self.rows, self.schema))
        self.rows.clear()

    def close(self) -> None:
        """End the present file; one without rows is written where there is none at all."""
        if self.rows or not self.files:
            self.flush()
        if self.writer is not None:
            self.writer.close()
        self.writer = None


@dataclass
class Export:
    """One corpus folder on its way into a dataset."""

    root: Path
    folder: Path
    train: list[Document]  # as the streams have them: a token budget may have cut the last
    tokenizer: Tokenizer | None
    vocabulary: TokenizerManifest | None
    quality: QualityConfig

    def run(self) -> str:
        """Write everything; returns a line for each config.

        Raises:
            FileNotFoundError: there are no generations.
            ValueError: the folder is there, or a stream is older than its generations.
        """
        if self.folder.exists():
            raise ValueError(f"export={self.folder} is there already; name a new folder")
        stores = [
            GenerationStore(path.parent)
            for path in sorted((self.root / "generations").glob("*/manifest.json"))
        ]
        stores = [store for store in stores if store.parts()]
        if not stores:
            raise FileNotFoundError(f"{self.root} holds no generations to export")
        self.documents_hash = hash_of(self.train)
        streams = self.streams()
        with replace_folder(self.folder) as unfinished:
            parts = [self.export_store(store, unfinished) for store in stores]
            parts += [self.export_stream(manifest, unfinished) for manifest in streams]
            write_card(unfinished, self.root, parts)
        lines = [f"{part.name}: {part.described}" for part in parts]
        return "\n".join([*lines, f"dataset: {self.folder}"])

    def streams(self) -> list[dict[str, Any]]:
        """Manifests of the synthetic streams, all of them current."""
        manifests = [
            read_manifest(path.parent)
            for path in sorted((self.root / "streams").glob("*/manifest.json"))
        ]
        manifests = [one for one in manifests if one["kind"] in SYNTHETIC]
        for manifest in manifests:
            made_of = "+".join(store.fingerprint() for store in self.stores_of(manifest))
            if manifest["generated"] != made_of or manifest["documents"] != self.documents_hash:
                raise ValueError(
                    f"the stream {manifest['name']} is older than its generations or documents, or "
                    "has another corpus.token_budget; build it again with generate.py streams, or "
                    f"delete {self.root / 'streams' / manifest['name']}"
                )
        return manifests

    def stores_of(self, manifest: dict[str, Any]) -> list[GenerationStore]:
        return [
            GenerationStore.of_method(
                self.root, method, manifest["generations"], manifest["kind"] == "latent"
            )
            for method in manifest["method"].split("+")
        ]

    def export_store(self, store: GenerationStore, folder: Path) -> Part:
        """Every document with its generations of one method."""
        import pyarrow.dataset as ds  # and with it pandas

        name = store.folder.name
        part = Part(name, store.settings(), store.imported)
        with connect(folder) as connection:
            connection.register("generations", ds.dataset(store.verified_parts(), schema=SCHEMA))
            document_keys(connection, self.root)
            for split, called in SPLITS.items():
                shards = Shards(folder / name, called, ROWS)
                counts = part.counts.setdefault(called, [0, 0, 0])
                for row in self.joined(connection, split):
                    texts = [generation["text"] for generation in row["generations"]]
                    size = len(row["text"]) + sum(map(len, texts))
                    shards.add(row, size)
                    counts[0] += 1
                    counts[1] += len(texts)
                    counts[2] += sum(map(len, texts))
                shards.close()
        table = quality_table(store, self.train, self.documents_hash, self.quality.processes)
        if store.imported:
            (folder / "provenance").mkdir(exist_ok=True)
            record = store.import_record()
            write_json(folder / "provenance" / f"{name}.json", record)
        if table.num_rows:
            failed = gates(columns_of(table), self.quality)
            part.quality = {gate: float(np.mean(found)) for gate, found in failed.items()}
        return part

    def joined(self, connection: duckdb.DuckDBPyConnection, split: str) -> Iterator[dict[str, Any]]:
        """The documents of a split in their order, with their generations by index."""
        reader = connection.sql(JOINED, params=[split]).to_arrow_reader(BATCH_ROWS)
        generations = (row for batch in reader for row in batch.to_pylist())
        grouped = itertools.groupby(generations, key=lambda row: row["place"])
        following = next(grouped, None)
        for place, row in enumerate(tqdm(rows_of(self.root, split), leave=False, unit="doc")):
            found = []
            if following is not None and following[0] == place:
                found = [{name: one[name] for name in GENERATION.names} for one in following[1]]
                following = next(grouped, None)
            yield {**row, "generations": found}

    def export_stream(self, manifest: dict[str, Any], folder: Path) -> Part:
        """The megadocs of a stream as text, with their borders."""
        assert self.tokenizer is not None
        assert self.vocabulary is not None
        allowed = {"missing": "allow", "missing_share": 1.0}  # it was when the stream was built
        settings = {**manifest["config"], **allowed, "generations": []}
        config, kind = StreamConfig(**settings), manifest["kind"]
        methods = manifest["method"].split("+")
        count = manifest["generations"] // len(methods)
        quality = QualityConfig(**manifest["quality"])
        chosen, _, _ = choose_generations(
            self.stores_of(manifest),
            count,
            self.train,
            self.documents_hash,
            config,
            quality,
            self.tokenizer if kind == "latent" else None,
        )
        separator = self.vocabulary.eos_token if config.separator is None else config.separator
        part = Part(f"megadocs-{manifest['name']}", {"separator": separator, **settings}, False)
        shards = Shards(folder / "megadocs" / manifest["name"], "train", MEGADOCS)
        counts = part.counts.setdefault("train", [0, 0, 0])
        for one, store in zip(chosen, self.stores_of(manifest), strict=True):
            one.texts = store.read(["text"])["text"]
        layout = lay_out(kind, self.train, chosen, config, lambda: self.starts)
        delimiters = (config.open_thought, config.close_thought)
        for megadoc in with_texts(layout, self.train, chosen, *delimiters):
            row = text_and_borders(megadoc, separator, methods)
            shards.add(row, len(row["text"]))
            counts[0] += 1
            counts[1] += sum(kind != KINDS[REAL] for kind in row["member_kinds"])
            counts[2] += len(row["text"])
        shards.close()
        part.path = f"megadocs/{manifest['name']}"
        return part

    def starts(self, place: int) -> list[int]:
        """The character where each token of a training document starts."""
        assert self.tokenizer is not None
        return starts_of(self.tokenizer, [self.train[place].text])[0]


def text_and_borders(megadoc: Megadoc, separator: str, methods: list[str]) -> dict[str, Any]:
    """A megadoc as one text; as in the shards a member ends behind its separator.

    A document with thoughts is one text without separators.
    """
    one_text = any(member.kind == THOUGHT for member in megadoc.members)
    last = len(megadoc.members) - 1
    pieces = [
        member.text + ("" if one_text or place == last else separator)
        for place, member in enumerate(megadoc.members)
    ]
    return {
        "id": megadoc.id,
        "document_id": megadoc.document_id,
        "text": "".join(pieces),
        "member_ends": list(itertools.accumulate(map(len, pieces))),
        "member_kinds": [KINDS[member.kind] for member in megadoc.members],
        "member_methods": [
            None if member.kind == REAL else methods[member.style] for member in megadoc.members
        ],
        "member_indices": [member.index for member in megadoc.members],
    }


@contextmanager
def connect(folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB that spills into a folder that is gone at the end."""
    spill = folder / "spill"
    with duckdb.connect(
        config={"memory_limit": MEMORY, "temp_directory": str(spill)}
    ) as connection:
        yield connection
    shutil.rmtree(spill, ignore_errors=True)


def document_keys(connection: duckdb.DuckDBPyConnection, root: Path) -> None:
    """The table ``keys``: id, hash of the text, split and place of each document."""
    connection.execute(
        "CREATE TABLE keys (id VARCHAR, text_hash VARCHAR, split VARCHAR, place BIGINT)"
    )
    for split in SPLITS:
        for first, batch in numbered(batches_of(root, split, ["id", "text"])):
            hashes = [hash_text(text) for text in batch["text"].to_pylist()]
            places = pa.array(range(first, first + batch.num_rows), pa.int64())
            rows = pa.table({"id": batch["id"], "text_hash": hashes, "place": places})
            connection.register("batch", rows)
            connection.execute(
                "INSERT INTO keys SELECT id, text_hash, ?, place FROM batch", [split]
            )
            connection.unregister("batch")


def numbered(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches with the number of their first row."""
    first = 0
    for batch in batches:
        yield first, batch
        first += batch.num_rows


def batches_of(root: Path, split: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Documents of a split that are used (``corpus.near_duplicates`` may leave some out)."""
    folder = root / "documents"
    unused = pa.array(sorted(left_out(folder, split)), pa.string())
    parquet = pq.ParquetFile(folder / f"{split}.parquet", pre_buffer=False)
    for batch in parquet.iter_batches(BATCH_ROWS, columns=columns):
        yield batch.filter(pc.invert(pc.is_in(batch["id"], unused)))


def rows_of(root: Path, split: str) -> Iterator[dict[str, Any]]:
    """Id, text and metadata of each document of a split."""
    for batch in batches_of(root, split, ["id", "text", "metadata"]):
        yield from batch.to_pylist()
