"""How fast ``generator=import`` reads published rephrases, and that its memory does not grow.

    python -m benchmarks.importing --documents 25000 100000 --output benchmarks/results/NAME.json

For each number of documents it writes Parquet files of FinePhrase's layout (random words, four
generations a document), imports documents and generations into a fresh folder, and tells text a
second, text a second of CPU time, and the most memory that all processes of the import held at once
(their resident sizes added up, shared pages counted in each). ``--layout nemotron_cc`` writes
generations that name their source instead, in random order, as Zstandard JSON lines.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import random
import resource
import tempfile
import threading
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from gen.corpus.documents import CorpusConfig
from gen.exchange.config import ImportConfig
from gen.exchange.importing import Import

GENERATIONS = 4
SOURCE, REPHRASE = 3000, 2200  # characters, about what FineWeb-Edu and FinePhrase have
PER_FILE = 5000  # documents
LOOK_EVERY = 0.2  # seconds


class Texts:
    """Random words: sources of their own, rephrases as slices of one long text (made faster)."""

    def __init__(self) -> None:
        chooser = random.Random(0)
        letters = "abcdefghijklmnopqrstuvwxyz"
        words = ["".join(chooser.choices(letters, k=chooser.randint(2, 9))) for _ in range(20_000)]
        self.words = words
        self.long = " ".join(chooser.choices(words, k=1_000_000))
        self.chooser = chooser

    def source(self, name: str) -> str:
        """No near-duplicate of another, as sources are compared with the held-out ones."""
        words = self.chooser.choices(self.words, k=SOURCE // 3)  # of 2 letters and a space at least
        return f"{name}: {' '.join(words)}"[:SOURCE]

    def rephrase(self, name: str) -> str:
        start = self.chooser.randrange(len(self.long) - REPHRASE)
        return f"{name}: {self.long[start : start + REPHRASE - len(name) - 2]}"


def write_finephrase(folder: Path, documents: int) -> ImportConfig:
    """Source and generations in a row."""
    texts = Texts()
    for first in range(0, documents, PER_FILE):
        rows = [
            {
                "id": f"<urn:uuid:{number:032d}>",
                "text": texts.source(str(number)),
                "rollout_results": [
                    {"text": texts.rephrase(f"{number}/{index}"), "finish_reason": "stop"}
                    for index in range(GENERATIONS)
                ],
            }
            for number in range(first, min(first + PER_FILE, documents))
        ]
        path = folder / f"{first:09d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1000, compression="snappy")
    return ImportConfig(
        path=str(folder),
        generation_column="rollout_results.text",
        columns={"finish_reason": "rollout_results.finish_reason"},
    )


def write_nemotron_cc(folder: Path, documents: int) -> ImportConfig:
    """Sources in one set of files, generations in another, both shuffled."""
    texts = Texts()

    def write(name: str, keys: list[tuple[int, int | None]]) -> None:
        texts.chooser.shuffle(keys)
        for first in range(0, len(keys), PER_FILE):
            lines = []
            for number, index in keys[first : first + PER_FILE]:
                text = (
                    texts.source(str(number))
                    if index is None
                    else texts.rephrase(f"{number}/{index}")
                )
                lines.append(json.dumps({"warc_record_id": f"<urn:{number:032d}>", "text": text}))
            content = zstandard.compress("\n".join(lines).encode())
            path = folder / name / f"{first:09d}.jsonl.zst"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)

    write("sources", [(number, None) for number in range(documents)])
    write("rewrites", [(n, index) for n in range(documents) for index in range(GENERATIONS)])
    return ImportConfig(
        path=str(folder / "rewrites"),
        generation_column="text",
        text_column=None,
        id_column="warc_record_id",
        sources=str(folder / "sources"),
        source_id_column="warc_record_id",
    )


def run_import(config: ImportConfig, root: Path) -> None:
    corpus = CorpusConfig(format="import", path=config.sources or config.path)
    Import(config, "rephrase", corpus, root).run()


def most_memory(process: psutil.Process, peak: list[int], done: threading.Event) -> None:
    """Keep in ``peak[0]`` the most bytes that a process and its descendants hold at once."""
    while not done.wait(LOOK_EVERY):
        total = 0
        for one in [process, *process.children(recursive=True)]:
            try:
                total += one.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak[0] = max(peak[0], total)


def measure(layout: str, documents: int, processes: int, scratch: Path) -> dict[str, Any]:
    """Import so many documents once."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        files, root = Path(folder) / "files", Path(folder) / "root"
        files.mkdir()
        write = write_finephrase if layout == "finephrase" else write_nemotron_cc
        config = write(files, documents)
        config.processes = processes
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        child = get_context("spawn").Process(target=run_import, args=(config, root))
        child.start()
        assert child.pid is not None
        peak, done = [0], threading.Event()
        watcher = threading.Thread(
            target=most_memory, args=(psutil.Process(child.pid), peak, done), daemon=True
        )
        watcher.start()
        child.join()
        done.set()
        watcher.join()
        seconds = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if child.exitcode:
            raise RuntimeError(f"the import of {documents:,} documents failed")
        record = json.loads((root / "generations" / "rephrase" / "import.json").read_text())
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    megabytes = record["characters"] / 1e6
    return {
        "layout": layout,
        "documents": documents,
        "generations": record["generations"] + record["left_out"]["held_out"],
        "text_megabytes": round(megabytes),
        "processes": processes,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "megabytes_per_second": round(megabytes / seconds, 1),
        "megabytes_per_cpu_second": round(megabytes / cpu, 1),
        "peak_memory_megabytes": round(peak[0] / 1e6),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, nargs="+", default=[25_000, 100_000])
    parser.add_argument("--layout", nargs="+", default=["finephrase", "nemotron_cc"])
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--scratch", type=Path, help="folder for files that are deleted again")
    parser.add_argument("--note", default="", help="what a reader must know about this measurement")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    rows = []
    for layout in options.layout:
        for documents in options.documents:
            rows.append(measure(layout, documents, options.processes, options.scratch))
            print(json.dumps(rows[-1]), flush=True)
    names = ("pyarrow", "duckdb", "zstandard", "numpy")
    result = {
        "command": "python -m benchmarks.importing",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()}-core {platform.machine()} CPU",
        "versions": {name: importlib.metadata.version(name) for name in names},
        "note": options.note,
        "imports": rows,
    }
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
