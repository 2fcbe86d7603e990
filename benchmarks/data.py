"""What it costs to turn generations into streams, at three sizes, beside what others need.

    python -m benchmarks.data --output benchmarks/results/NAME.json

For each number of documents (x 32 generations of about 800 characters) it makes a corpus folder
without a model, then measures in processes of their own, by CPU time and by the most memory that
all processes held at once:

- tokenizing all texts once with ``tokenizers``' batch call, which nothing can undercut;
- judging them;
- ten streams (simple and stitched, G = 2, 4, 8, 16, 32) by ``generate.py streams``;
- two of these again, their texts tokenized already;
- opening a stream to train, and reading all of it, ours and with ``StreamingDataset``;
- the same texts through ``datasets.map`` and ``save_to_disk``, and through datatrove's
  ``DocumentTokenizer`` where it is installed.

``--memory`` adds sizes with short texts, for memory alone. Every cost is fitted as a line over the
sizes: a fixed part (starting, importing) and a slope, which is what large corpora pay.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import random
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from benchmarks.importing import most_memory
from gen.corpus.documents import CorpusConfig, hash_of, load_split
from gen.corpus.tokenizer import TokenizerConfig, load_tokenizer
from gen.generations.store import SCHEMA, GenerationStore, batches_of
from gen.megadocs.config import StreamConfig
from gen.pipeline import GenerateConfig, generate
from gen.quality.table import quality_table
from trainer.files import write_json

RESULTS = Path(__file__).parent / "results"
GENERATIONS = 32
SIZES = [2, 4, 8, 16, 32]
LONG, SHORT = 800, 100  # characters of a text
PART_ROWS = 1 << 16  # what generation merges its parts to
METHOD = "rephrase"
LARGE = {  # what is extrapolated to: generations, and tokens of them
    "the paper's run": (5_200_000, 3_700_000_000),
    "ten billion tokens": (14_100_000, 10_000_000_000),
}


class Texts:
    """Slices of the Python reference, each with a number of its own."""

    def __init__(self) -> None:
        from pydoc_data.topics import topics

        self.long = " ".join(" ".join(text.split()) for text in topics.values())
        self.chooser = random.Random(0)

    def one(self, name: str, characters: int) -> str:
        start = self.chooser.randrange(len(self.long) - characters)
        return f"{name} {self.long[start : start + characters - len(name) - 1]}"


def config_of(root: Path, task: str) -> GenerateConfig:
    """What ``generate.py`` is told."""
    return GenerateConfig(
        task=task,
        root=str(root),
        corpus=CorpusConfig(format="jsonl", path=f"{root}.jsonl", id_column="id", held_out=0.01),
        tokenizer=TokenizerConfig(vocab_size=4096),
        streams=StreamConfig(generations=SIZES),
    )


def make_corpus(root: Path, documents: int, characters: int) -> None:
    """Documents, tokenizer, the streams ``real`` and ``val``, and a store of generations."""
    texts = Texts()
    with Path(f"{root}.jsonl").open("w") as file:
        for number in range(documents):
            row = {"id": f"document-{number:08d}", "text": texts.one(str(number), 2 * characters)}
            file.write(json.dumps(row) + "\n")
    generate(config_of(root, "corpus"))
    store = GenerationStore.of_method(root, METHOD, GENERATIONS)
    store.claim({"method": METHOD})
    keys = (
        (document, index) for document in load_split(root, "train") for index in range(GENERATIONS)
    )
    for number in itertools.count():
        rows = [
            {
                "document_id": document.id,
                "method": METHOD,
                "index": index,
                "text": texts.one(f"{document.id}/{index}", characters),
                "finish_reason": "stop",
                "created_at": 1.0,
                "text_hash": document.text_hash,
            }
            for document, index in itertools.islice(keys, PART_ROWS)
        ]
        if not rows:
            return
        store.write_part(
            store.folder / f"part-000-{number:06d}.parquet", pa.Table.from_pylist(rows, SCHEMA)
        )


def build_streams(root: Path, names: list[str]) -> dict[str, Any]:
    """``generate.py streams``, after taking away the streams of these names."""
    for name in names:
        shutil.rmtree(root / "streams" / name, ignore_errors=True)
    generate(config_of(root, "streams"))
    manifests = [read_manifest_of(root, name) for name in names]
    return {"tokens": sum(one["tokens"] for one in manifests)}


def read_manifest_of(root: Path, name: str) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((root / "streams" / name / "manifest.json").read_bytes())
    return manifest


def texts_of(root: Path) -> Iterator[list[str]]:
    """All texts that the streams hold, some at a time."""
    yield [document.text for document in load_split(root, "train")]
    for part in GenerationStore.of_method(root, METHOD, GENERATIONS).parts():
        for batch in batches_of(part, ["text"]):
            yield batch["text"].to_pylist()


def tokenize_once(root: Path) -> dict[str, Any]:
    """``tokenizers``' batch call over all texts."""
    tokenizer, _ = load_tokenizer(root)
    tokens = 0
    for texts in texts_of(root):
        for start in range(0, len(texts), 1000):
            batch = tokenizer.encode_batch_fast(
                texts[start : start + 1000], add_special_tokens=False
            )
            tokens += sum(map(len, batch))
    return {"tokens": tokens}


def judge(root: Path) -> dict[str, Any]:
    """The quality table of all generations."""
    documents = list(load_split(root, "train"))
    store = GenerationStore.of_method(root, METHOD, GENERATIONS)
    return {"generations": quality_table(store, documents, hash_of(documents)).num_rows}


def with_datasets(root: Path) -> dict[str, Any]:
    """``datasets.map`` with the same batch call, and ``save_to_disk``."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    tokenizer, vocabulary = load_tokenizer(root)
    files = [str(p) for p in GenerationStore.of_method(root, METHOD, GENERATIONS).parts()]
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        rows = Dataset.from_parquet(files, columns=["text"], cache_dir=scratch)

        def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            found = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
            return {"input_ids": [[*one.ids, vocabulary.eos_id] for one in found]}

        mapped = rows.map(encode, batched=True, remove_columns=["text"], new_fingerprint="ids")
        mapped.save_to_disk(f"{scratch}/saved")
        lengths = pa.compute.list_value_length(mapped.data.column("input_ids"))
        return {"tokens": pa.compute.sum(lengths).as_py()}


def with_datatrove(root: Path) -> dict[str, Any]:
    """datatrove's pipeline from Parquet to token files."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    _, vocabulary = load_tokenizer(root)
    store = GenerationStore.of_method(root, METHOD, GENERATIONS)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        LocalPipelineExecutor(
            pipeline=[
                ParquetReader(
                    str(store.folder), glob_pattern="part-*.parquet", id_key="document_id"
                ),
                DocumentTokenizer(
                    f"{scratch}/tokens",
                    tokenizer_name_or_path=str(root / "tokenizer" / "tokenizer.json"),
                    eos_token=vocabulary.eos_token,
                    shuffle_documents=False,
                ),
            ],
            logging_dir=f"{scratch}/logs",
        ).run()
        size = sum(path.stat().st_size for path in Path(scratch).rglob("*.ds"))
    return {"tokens": size // 2}  # a vocabulary of 4096 is kept in two bytes


def open_stream(root: Path) -> dict[str, Any]:
    """The largest stream, as training opens it."""
    from trainer.data.mds import MegadocStream

    return {"samples": len(MegadocStream(root / "streams" / f"simple-g{GENERATIONS}"))}


def read_ours(root: Path) -> dict[str, Any]:
    """Every sample of the largest stream, in an order of our own."""
    from trainer.data.mds import MegadocStream

    stream = MegadocStream(root / "streams" / f"simple-g{GENERATIONS}")
    order = np.random.default_rng(0).permutation(len(stream)).tolist()
    return {"tokens": sum(len(stream[place].tokens) for place in order)}


def read_streaming(root: Path) -> dict[str, Any]:
    """Every sample of the largest stream by mosaicml-streaming, shuffled in its way."""
    from streaming import StreamingDataset

    dataset = StreamingDataset(
        local=str(root / "streams" / f"simple-g{GENERATIONS}"), shuffle=True, batch_size=1
    )
    return {"tokens": sum(len(sample["tokens"]) for sample in dataset)}


def run_and_send(sender: Any, call: Callable[..., dict[str, Any]], root: Path, *rest: Any) -> None:
    sender.send(call(root, *rest))


def measured(call: Callable[..., dict[str, Any] | None], root: Path, *rest: Any) -> dict[str, Any]:
    """What a call returns, with its seconds, CPU seconds and most memory, children included."""
    receiver, sender = get_context("spawn").Pipe(duplex=False)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    child = get_context("spawn").Process(target=run_and_send, args=(sender, call, root, *rest))
    child.start()
    sender.close()
    assert child.pid is not None
    peak, done = [0], threading.Event()
    watcher = threading.Thread(target=most_memory, args=(psutil.Process(child.pid), peak, done))
    watcher.start()
    try:
        found = receiver.recv() or {}
    finally:
        child.join()
        done.set()
        watcher.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"  {call.__name__}: {cpu:.1f} CPU s, {peak[0] / 1e6:.0f} MB {found}", flush=True)
    return {
        **found,
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(cpu, 2),
        "peak_megabytes": round(peak[0] / 1e6),
    }


def measure_size(documents: int, scratch: Path, peers: bool) -> dict[str, Any]:
    """Everything at one size."""
    root = scratch / f"corpus-{documents}"
    print(f"{documents:,} documents x {GENERATIONS}", flush=True)
    measured(make_corpus, root, documents, LONG)
    ten = [f"{kind}-g{size}" for size in SIZES for kind in ("simple", "stitched")]
    largest = [f"{kind}-g{GENERATIONS}" for kind in ("simple", "stitched")]
    train = sum(1 for _ in load_split(root, "train"))
    found = {
        "documents": train,
        "generations": train * GENERATIONS,
        "tokenize_once": measured(tokenize_once, root),
        "judge": measured(judge, root),
        "ten_streams": measured(build_streams, root, ten),
        "start": measured(build_streams, root, []),
        "two_again": measured(build_streams, root, largest),
        "open": measured(open_stream, root),
        "read": measured(read_ours, root),
        "read_streaming": measured(read_streaming, root),
    }
    if peers:
        found["datasets"] = measured(with_datasets, root)
        if importlib.util.find_spec("datatrove"):
            found["datatrove"] = measured(with_datatrove, root)
    shutil.rmtree(root)
    return found


def measure_memory(documents: int, scratch: Path) -> dict[str, Any]:
    """Memory alone, with short texts."""
    root = scratch / f"short-{documents}"
    print(f"{documents:,} documents x {GENERATIONS}, short texts", flush=True)
    measured(make_corpus, root, documents, SHORT)
    largest = [f"{kind}-g{GENERATIONS}" for kind in ("simple", "stitched")]
    found = {
        "generations": sum(1 for _ in load_split(root, "train")) * GENERATIONS,
        "judge": measured(judge, root),
        "build": measured(build_streams, root, largest),
        "open": measured(open_stream, root),
    }
    shutil.rmtree(root)
    return found


def line(rows: list[dict[str, Any]], part: str, value: str, over: str) -> dict[str, float]:
    """Fixed part and slope of a cost over a count that stands in the part or in the row."""
    counts = [row[part].get(over, row.get(over)) for row in rows]
    slope, fixed = np.polyfit(counts, [row[part][value] for row in rows], 1)
    return {"fixed": float(fixed), "slope": float(slope)}


def summary(rows: list[dict[str, Any]], memory: list[dict[str, Any]]) -> dict[str, Any]:
    """What the sizes say together."""
    last = rows[-1]
    tokenizing = line(rows, "tokenize_once", "cpu_seconds", "tokens")
    ten = line(rows, "ten_streams", "cpu_seconds", "generations")
    once = line(rows, "tokenize_once", "cpu_seconds", "generations")
    again = line(rows, "two_again", "cpu_seconds", "tokens")
    judging = line(rows, "judge", "cpu_seconds", "generations")
    found: dict[str, Any] = {
        "tokenize_once_tokens_per_cpu_second": 1 / tokenizing["slope"],
        "ten_streams_over_tokenizing_once": {
            "by_slopes": ten["slope"] / once["slope"],
            "at_the_largest_size": last["ten_streams"]["cpu_seconds"]
            / last["tokenize_once"]["cpu_seconds"],
        },
        "written_again_tokens_per_cpu_second": {
            "by_slope": 1 / again["slope"],
            "at_the_largest_size": last["two_again"]["tokens"] / last["two_again"]["cpu_seconds"],
        },
        "judging_milliseconds_a_generation": 1e3 * judging["slope"],
        "reading_tokens_per_cpu_second": {
            name: 1 / line(rows, part, "cpu_seconds", "tokens")["slope"]
            for name, part in (("ours", "read"), ("StreamingDataset", "read_streaming"))
        },
        "peers_tokens_per_cpu_second": {
            name: 1 / line(rows, name, "cpu_seconds", "tokens")["slope"]
            for name in ("datasets", "datatrove")
            if all(name in row for row in rows)
        },
    }
    if memory:
        found["memory"] = {
            part: {
                "fixed_megabytes": fit["fixed"],
                "bytes_a_generation": fit["slope"] * 1e6,
            }
            for part in ("judge", "build", "open")
            for fit in [line(memory, part, "peak_megabytes", "generations")]
        }
    per_token = last["ten_streams"]["tokens"] / last["tokenize_once"]["tokens"]
    found["extrapolated"] = {
        name: {
            "cpu_hours": {
                "tokenizing once": tokens * tokenizing["slope"] / 3600,
                "judging": generations * judging["slope"] / 3600,
                "writing one simple and one stitched stream again": 2
                * tokens
                * again["slope"]
                / 3600,
                "ten streams": tokens * (tokenizing["slope"] + per_token * again["slope"]) / 3600,
            },
            "assumed": "costs grow in proportion to tokens, judging to generations, as they did "
            "over the three sizes; token ids fit the page cache or a disk that reads 700 bytes "
            "anywhere at once; cores share nothing but the disk",
        }
        for name, (generations, tokens) in LARGE.items()
    }
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """CPU time against size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    names = {
        "judge": "judging",
        "ten_streams": "ten streams, tokenizing included",
        "datasets": "datasets.map, one stream",
        "datatrove": "datatrove, one stream",
        "tokenize_once": "tokenizers' batch call, once",
        "two_again": "two streams again",
    }
    counts = [row["generations"] for row in rows]
    for part, name in names.items():
        if all(part in row for row in rows):
            axes.plot(counts, [row[part]["cpu_seconds"] for row in rows], "o-", label=name)
    axes.set_xlabel("generations")
    axes.set_ylabel("CPU seconds")
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, nargs="+", default=[2500, 5000, 10_000])
    parser.add_argument("--memory", type=int, nargs="*", default=[10_000, 20_000, 40_000])
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--scratch", type=Path, help="folder for files that are deleted again")
    parser.add_argument("--output", type=Path, default=RESULTS / "data-2-core-cpu.json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        rows = [
            measure_size(documents, Path(folder), not options.no_peers)
            for documents in options.documents
        ]
        memory = [measure_memory(documents, Path(folder)) for documents in options.memory]
    from benchmarks.timing import processor  # imports torch, which none of the processes should

    result = {
        "command": "python -m benchmarks.data",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {processor()}",
        "versions": versions(),
        "summary": summary(rows, memory),
        "sizes": rows,
        "memory": memory,
    }
    write_json(options.output, result)
    draw(rows, options.output.with_suffix(".png"))
    print(json.dumps(result["summary"], indent=1))
    return result


def versions() -> dict[str, str]:
    """Of what is measured."""
    import importlib.metadata

    names = ("tokenizers", "pyarrow", "numpy", "mosaicml-streaming", "datasets", "datatrove")
    found = {}
    for name in names:
        if importlib.util.find_spec(name.removeprefix("mosaicml-")):
            found[name] = importlib.metadata.version(name)
    return found


if __name__ == "__main__":
    main()
