"""How far judging, tokenizing and building are, told from the files alone."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gen.generations.store import GenerationStore, footer_of
from gen.work import Progress
from trainer.data.format import MANIFEST, read_manifest
from trainer.files import optional, read_json

ACTIVE = 120.0  # seconds since its last note after which a writer no longer counts as running


def streams_status(root: Path) -> str:
    """A few lines for what is made of the generations in ``root``."""
    return "\n".join([*judged(root), *tokenized(root), *streams(root)])


def judged(root: Path) -> Iterator[str]:
    """Of each store, how many generations the quality gates have measured, and who is at it."""
    for manifest in sorted((root / "generations").glob("*/manifest.json")):
        store = GenerationStore(manifest.parent)
        rows = sum(footer_of(part).num_rows for part in store.parts())
        building = sorted(store.folder.glob(".quality.*.building"))
        units = [unit for folder in building for unit in folder.glob("*.parquet")]
        measured = sum(map(rows_of, units or [store.folder / "quality.parquet"]))
        yield f"{store.folder}: {measured:,} of {rows:,} generations judged"
        for folder in building:
            yield from writers(folder / "locks")


def rows_of(path: Path) -> int:
    """Of a Parquet file; none where it is not there, or damaged and so made again."""
    with contextlib.suppress(pa.ArrowException, OSError):
        rows: int = pq.read_metadata(path).num_rows
        return rows
    return 0


def tokenized(root: Path) -> Iterator[str]:
    """Of each tokenizer, how many texts are tokenized, and who is at it."""
    for folder in sorted(path.parent for path in (root / "tokens").glob("*/tokenizer.json")):
        if folder.name.endswith("-starts"):
            continue
        texts = tokens = 0
        for keys in folder.glob("*.keys"):
            try:
                counts = pq.read_table(keys, columns=["count"])["count"]
            except (pa.ArrowException, OSError):  # damaged: tokenized again
                continue
            texts += len(counts)
            tokens += pc.sum(counts).as_py() or 0
        yield f"{folder}: {texts:,} texts tokenized, {tokens:,} tokens"
    yield from writers(root / "tokens" / "locks")


def streams(root: Path) -> Iterator[str]:
    """The streams that are there, and those that are being built."""
    for path in sorted((root / "streams").glob(f"*/{MANIFEST}")):
        manifest = read_manifest(path.parent)
        yield f"{path.parent}: {manifest['samples']:,} samples, {manifest['tokens']:,} tokens"
    for building in sorted((root / "streams").glob(".*.building")):
        name = building.name.removeprefix(".").split(".")[0]
        written = len(list((building / "units").glob("*.json")))
        yield f"{root / 'streams' / name}: not complete, {written:,} shards written"
        yield from writers(building / "locks")


def writers(locks: Path) -> Iterator[str]:
    """Who works at some units, at what speed, and when all is done at the speed of all."""
    found = [optional(note, read_json) for note in sorted(locks.glob("writer-*.json"))]
    notes = [Progress(**note) for note in found if note is not None]
    running = [note for note in notes if time.time() - note.now < ACTIVE]
    for note in notes:
        state = "" if note in running else ", not seen since"
        yield (
            f"  writer {note.writer} of {note.writers} on {note.host}, {note.processes} processes: "
            f"{note.label}, {note.done:,} of {note.total:,} {note.unit}, "
            f"{note.speed:,.0f} {note.unit}/s{state}"
        )
    speed = sum(note.speed for note in running)
    if speed:
        left = max(note.total for note in running) - sum(note.done for note in running)
        yield f"  {datetime.timedelta(seconds=round(max(0, left) / speed))} left at that speed"
