"""How fast a running server generates under our client, and what share of the prompts it caches.

    python -m benchmarks.generation --url http://127.0.0.1:30000 --model NAME

The documents are those of a JSONL file with a ``text`` column, or texts of random words. To compare
with the server's own offline benchmark, write the same prompts in the form it reads, run it with as
many tokens an answer as were generated here on average, and give what it reached::

    python -m benchmarks.generation --url ... --model NAME --prompts prompts.json
    python -m sglang.benchmark.offline_throughput --model-path NAME --dataset-name sharegpt \\
        --dataset-path prompts.json --num-prompts 8192 --sharegpt-output-len 700
    python -m benchmarks.generation --url ... --model NAME --offline-tokens-per-second 15000

The result is printed, and written as JSON with ``--output``. The goals: a cached share of at least
0.97 (G - 1) / G, at least 0.95 of the offline throughput.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from gen.corpus.documents import Document
from gen.corpus.tokenizer import TokenizerConfig, train_bpe
from gen.generations.job import run_job
from gen.generations.sessions import Session
from gen.prompts import MethodConfig
from gen.serving.load import ServerLoad, parse_load
from gen.serving.servers import GeneratorConfig, serving

SYSTEM = "Answer with the requested text alone, without remarks about it."
PROMPT = "Document:\n{text}\n\nRewrite the document above in other words. Keep every fact."
LOOK_EVERY = 1.0  # seconds between looks at the server's queue


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", action="append", required=True, help="a server; may be repeated")
    parser.add_argument("--model", required=True, help="its name as /v1/models lists it")
    parser.add_argument("--documents", type=int, default=256)
    parser.add_argument("--words", type=int, default=900, help="of a random document")
    parser.add_argument("--jsonl", type=Path, help="documents with a 'text' column")
    parser.add_argument("--generations", type=int, default=32, help="G, of each document")
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--context-length", type=int, default=8192)
    parser.add_argument("--concurrency", type=int, default=2048, help="at each server, at most")
    parser.add_argument("--siblings", type=int, default=32, help="of one document in flight")
    parser.add_argument("--fixed", action="store_true", help="keep the concurrency as it is")
    parser.add_argument("--no-warm-up", action="store_true")
    parser.add_argument("--prompts", type=Path, help="only write the prompts, as ShareGPT does")
    parser.add_argument("--note", default="", help="about the machine, for the result")
    parser.add_argument("--offline-tokens-per-second", type=float)
    parser.add_argument("--output", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    documents = read_documents(options)
    method = MethodConfig(
        "benchmark",
        generations=options.generations,
        system=SYSTEM,
        prompt=PROMPT,
        max_tokens=options.max_tokens,
    )
    if options.prompts:
        write_prompts(options.prompts, method, documents)
        return {}
    config = GeneratorConfig(
        "openai",
        model=options.model,
        urls=options.url,
        context_length=options.context_length,
        concurrency=options.concurrency,
        adaptive=not options.fixed,
        siblings_in_flight=options.siblings,
        warm_up=not options.no_warm_up,
    )
    tokenizer = train_bpe([], TokenizerConfig(vocab_size=257))  # only latent thoughts need one
    with tempfile.TemporaryDirectory() as folder, QueueWatch(options.url) as queue:
        before = time.thread_time()
        session = run_job(method, config, documents, tokenizer, Path(folder), serving)
        spent = time.thread_time() - before  # the client is this thread's event loop
    result = {
        "command": "python -m benchmarks.generation " + " ".join(arguments or sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()}-core {platform.machine()}, client and server on one machine: "
        + str(all("127.0.0.1" in url or "localhost" in url for url in options.url)),
        "note": options.note,
        "server": describe_server(options.url[0]),
        "python": platform.python_version(),
        "aiohttp": importlib.metadata.version("aiohttp"),
        "documents": len(documents),
        "generations_per_document": options.generations,
        **measured(session, options.generations, spent, options.offline_tokens_per_second),
        "queue": queue.summary(),
    }
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return result


def read_documents(options: argparse.Namespace) -> list[Document]:
    """The first documents of a file, or as many of random words of a fixed seed."""
    if options.jsonl:
        with options.jsonl.open() as lines:
            texts = [
                json.loads(line)["text"] for line in itertools.islice(lines, options.documents)
            ]
    else:
        chooser = random.Random(0)
        letters = "aeioulnrstmdk"
        sizes = [chooser.randrange(2, 9) for _ in range(5000)]
        words = ["".join(chooser.choices(letters, k=size)) for size in sizes]
        texts = [
            " ".join(chooser.choices(words, k=options.words)) for _ in range(options.documents)
        ]
    return [Document(f"document-{place}", text) for place, text in enumerate(texts)]


def write_prompts(path: Path, method: MethodConfig, documents: list[Document]) -> None:
    """ShareGPT's form: a list of conversations, each prompt G times, siblings in a row."""
    conversations = []
    for document in documents:
        chat = method.messages(0, text=document.text)
        prompt = "\n\n".join(part["content"] for part in chat)
        turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": "not read"}]
        conversations += [{"conversations": turns}] * method.generations
    path.write_text(json.dumps(conversations))


def measured(
    session: Session, generations: int, cpu: float, offline: float | None
) -> dict[str, Any]:
    """Throughput, cached share and the client's cost."""
    speed = session.completion_tokens / session.seconds
    ideal = (generations - 1) / generations
    found: dict[str, Any] = {
        "seconds": round(session.seconds, 2),
        "requests": session.requests,
        "completion_tokens": session.completion_tokens,
        "prompt_tokens": session.prompt_tokens,
        "tokens_per_second": round(speed, 1),
        "requests_per_second": round(session.requests / session.seconds, 2),
        "cached_share": round(session.cached_share, 4),
        "cached_share_of_ideal": round(session.cached_share / ideal, 4) if ideal else None,
        "client_cpu_seconds_per_1000_requests": round(1000 * cpu / session.requests, 3),
        "retries": session.retries,
        "failed": session.failed,
    }
    if offline:
        found["offline_tokens_per_second"] = offline
        found["ratio_to_offline"] = round(speed / offline, 4)
    return found


def describe_server(url: str) -> str:
    """What the server says it is."""
    for path in ("/server_info", "/get_server_info", "/version", "/props"):
        answer = httpx.get(url.rstrip("/") + path, timeout=30.0)
        if answer.status_code == 200:
            told = answer.json()
            for key in ("version", "build_info"):
                if key in told:
                    return f"{path}: {key} {told[key]}"
    return "unknown"


class QueueWatch:
    """Looks at the servers' queues once a second, from a thread of its own."""

    def __init__(self, urls: list[str]) -> None:
        self.urls = urls
        self.loads: list[ServerLoad] = []
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self) -> QueueWatch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def watch(self) -> None:
        with httpx.Client(timeout=10.0) as http:
            while not self.ended.wait(LOOK_EVERY):
                for url in self.urls:
                    try:
                        page = http.get(url.rstrip("/") + "/metrics")
                    except httpx.HTTPError:
                        continue
                    load = parse_load(page.text) if page.status_code == 200 else None
                    if load:
                        self.loads.append(load)

    def summary(self) -> dict[str, float] | str:
        """Mean length, and how often it was empty while requests ran."""
        if not self.loads:
            return "not shown by the server"
        busy = [load for load in self.loads if load.running > 0]
        waiting = [load.waiting for load in busy]
        return {
            "looks": len(busy),
            "mean_waiting": round(sum(waiting) / max(1, len(waiting)), 2),
            "empty_share": round(sum(one == 0 for one in waiting) / max(1, len(waiting)), 4),
            "mean_running": round(sum(load.running for load in busy) / max(1, len(busy)), 2),
        }


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
