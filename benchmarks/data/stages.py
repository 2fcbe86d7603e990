"""The stages from generations to samples, each a function of a corpus folder, and the peers."""

from __future__ import annotations

import itertools
import json
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
from gen.work import hold_little_memory

GENERATIONS = 32
SIZES = [2, 4, 8, 16, 32]
PART_ROWS = 1 << 16  # what generation merges its parts to
METHOD = "rephrase"


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
    """The quality table of all generations, as ``generate.py`` makes it."""
    hold_little_memory()
    documents = list(load_split(root, "train"))
    store = GenerationStore.of_method(root, METHOD, GENERATIONS)
    return {"generations": quality_table(store, documents, hash_of(documents)).num_rows}


def resume(root: Path) -> None:
    """Generation where everything is generated: what it must know before it asks for anything."""
    config = config_of(root, "generate")
    config.method.name, config.method.generations = METHOD, GENERATIONS
    config.method.prompt = "{text}"
    generate(config)


def report(root: Path) -> dict[str, Any]:
    """The page to judge the generations by, judged already."""
    generate(config_of(root, "report"))
    (page,) = (root / "reports").iterdir()
    return {"page_bytes": page.stat().st_size}


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
