"""Generation with the real embedded model: faults on real sockets, SIGKILL at random moments."""

import asyncio
import contextlib
import http.server
import json
import random
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from gen.client import ChatClient, GenerationFailed
from gen.corpus import Document, load_split
from gen.generation import run_job, shorten
from gen.prompts import MethodConfig
from gen.routing import Routing, ServersLost
from gen.servers import GeneratorConfig, embedded_server, serving
from gen.store import GenerationStore
from gen.tokenizer import load_tokenizer
from tests.conftest import REPOSITORY, TINY, run_script

REPHRASE = MethodConfig(prompt="Rewrite in other words: {text}", generations=3, max_tokens=8)
DOCUMENTS = [Document(f"d{i}", f"The {i}th cat sat on the mat and slept.") for i in range(4)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    config = GeneratorConfig(context_length=512, concurrency=4, threads=1)
    with embedded_server(config, tmp_path_factory.mktemp("server") / "server.log") as server:
        yield server.url


class Faults(http.server.BaseHTTPRequestHandler):
    """Passes requests on to a real server, after spoiling the first answers."""

    upstream: ClassVar[str] = ""
    faults: ClassVar[list[str]] = []
    lock = threading.Lock()

    def do_GET(self) -> None:
        self.answer(200, b"{}")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.lock:
            fault = self.faults.pop(0) if self.faults else None
        if fault == "reset":
            self.connection.close()
        elif fault in ("429", "500", "503", "401"):
            self.answer(int(fault), b"no")
        elif fault == "garbage":
            self.answer(200, b"<html>not json")
        elif fault == "abort":
            self.answer(200, json.dumps(aborted()).encode())
        elif fault == "truncated":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.connection.close()
        else:
            request = urllib.request.Request(
                self.upstream + self.path, body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request) as response:
                self.answer(response.status, response.read())

    def answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def aborted() -> dict[str, object]:
    message = {"content": "half a sen"}
    return {
        "choices": [{"message": message, "finish_reason": "abort"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 3},
    }


@contextlib.contextmanager
def faulty(upstream: str, faults: list[str]) -> Iterator[str]:
    Faults.upstream, Faults.faults = upstream, faults
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Faults) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_address[1]}"
        proxy.shutdown()


def ask(url: str, attempts: int, outage: float = 60.0) -> str:
    async def chat() -> str:
        async with ChatClient(Routing([url], outage), "m", 2, 30.0, attempts) as client:
            messages = [{"role": "user", "content": "Say something."}]
            answer = await client.chat(
                "d0", messages, max_tokens=5, temperature=1.0, top_p=1.0, seed=1
            )
            return answer.text

    return asyncio.run(chat())


@pytest.mark.parametrize("fault", ["reset", "429", "500", "503", "garbage", "truncated", "abort"])
def test_passing_faults_are_retried(server: str, fault: str) -> None:
    with faulty(server, [fault]) as url:
        assert ask(url, attempts=3) == ask(server, attempts=1)


def test_lasting_faults_are_reported(server: str) -> None:
    with (
        faulty(server, ["500"] * 9) as url,
        pytest.raises(GenerationFailed, match="2 attempts failed, the last with HTTP 500"),
    ):
        ask(url, attempts=2)
    with faulty(server, ["401"]) as url, pytest.raises(GenerationFailed, match="HTTP 401"):
        ask(url, attempts=5)
    with pytest.raises(ServersLost, match=r"no server has answered for 1 s.*ConnectError"):
        ask("http://127.0.0.1:9", attempts=1, outage=1.0)


def test_failed_documents_are_reported_and_tried_again(
    server: str, corpus_root: Path, tmp_path: Path
) -> None:
    tokenizer, _ = load_tokenizer(corpus_root)

    def run(urls: list[str]) -> None:
        config = GeneratorConfig("openai", urls=urls, concurrency=1, attempts=1)
        run_job(REPHRASE, config, DOCUMENTS, tokenizer, tmp_path, serving)

    with faulty(server, ["500"]) as url, pytest.raises(GenerationFailed, match=r"\(d0\)"):
        run([url])
    store = GenerationStore(tmp_path / "generations" / "rephrase")
    assert store.done() == {"d0": {1, 2}} | {f"d{i}": {0, 1, 2} for i in (1, 2, 3)}
    failures = json.loads((store.folder / "failures.json").read_text())
    assert list(failures) == ["d0#0"]
    run([server])
    assert store.done() == {f"d{i}": {0, 1, 2} for i in range(4)}
    texts = store.read()["text"].to_pylist()
    assert len(set(texts)) > len(DOCUMENTS)  # siblings differ
    config = GeneratorConfig("openai", urls=[server], model="another")
    with pytest.raises(ValueError, match="model: "):
        run_job(REPHRASE, config, DOCUMENTS, tokenizer, tmp_path, serving)


def test_raising_g_repeats_nothing(server: str, corpus_root: Path, tmp_path: Path) -> None:
    tokenizer, _ = load_tokenizer(corpus_root)
    config = GeneratorConfig("openai", urls=[server])
    for count, new in ((1, 4), (3, 8), (3, 0)):
        method = MethodConfig(prompt=REPHRASE.prompt, generations=count, max_tokens=8)
        made = run_job(method, config, DOCUMENTS, tokenizer, tmp_path, serving)
        assert made["generations"] == new


def test_long_documents_are_cut_to_fit_and_marked(
    server: str, corpus_root: Path, tmp_path: Path
) -> None:
    tokenizer, _ = load_tokenizer(corpus_root)
    documents = [Document("long", "word " * 3000), Document("short", "a few words")]
    config = GeneratorConfig("openai", urls=[server], context_length=512)
    latent = MethodConfig(
        "latent", True, 2, prompt="Before: {prefix} After: {suffix}", max_tokens=8
    )
    for method in (REPHRASE, latent):
        run_job(method, config, documents, tokenizer, tmp_path, serving)
        store = GenerationStore.of_method(tmp_path, method.name, method.generations)
        for row in store.read().to_pylist():
            assert row["truncated"] == (row["document_id"] == "long")
            assert row["prompt_tokens"] <= 512 - 8
            if row["truncated"]:
                assert row["prompt_tokens"] > 350  # no more is cut than must be
    config = GeneratorConfig("openai", urls=[server], context_length=75)
    with pytest.raises(GenerationFailed, match="not even the instructions fit"):
        run_job(REPHRASE, config, documents[:1], tokenizer, tmp_path / "b", serving)


def test_shortening_keeps_the_text_around_a_cut() -> None:
    assert shorten({"text": "abcdefgh"}, 0.5) == {"text": "abcd"}
    assert shorten({"prefix": "abcd", "suffix": "efgh"}, 0.5) == {"prefix": "cd", "suffix": "ef"}


def test_the_embedded_job_shares_prompt_prefixes(corpus_root: Path) -> None:
    rows = GenerationStore(corpus_root / "generations" / "rephrase").read().to_pylist()
    documents = [document.id for document in load_split(corpus_root, "train")]
    assert Counter((row["document_id"], row["index"]) for row in rows) == Counter(
        (name, index) for name in documents for index in range(2)
    )
    second = [row for row in rows if row["index"] == 1]
    cached = sum(row["cached_tokens"] for row in second)
    assert cached > 0.5 * sum(row["prompt_tokens"] for row in second)


@pytest.mark.slow
def test_sigkill_at_random_moments_loses_and_repeats_nothing(tmp_path: Path) -> None:
    arguments = [
        *TINY,
        "generator.flush_seconds=0.2",
        f"root={tmp_path}",
        "generator.concurrency=2",
    ]
    command = [sys.executable, "generate.py", "generate", *arguments]
    store = GenerationStore(tmp_path / "generations" / "rephrase")
    kept: set[tuple[str, int]] = set()
    kills = 0
    for seed in range(3):
        with subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            parts = len(store.parts())
            deadline = time.monotonic() + 60
            while len(store.parts()) == parts and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            time.sleep(random.Random(seed).uniform(0.0, 0.5))
            kills += process.poll() is None
            process.kill()
        now = {(name, index) for name, found in store.done().items() for index in found}
        assert kept <= now
        kept = now
    assert kills
    run_script("generate.py", "generate", *arguments)
    documents = [document.id for document in load_split(tmp_path, "train")]
    rows = store.read(["document_id", "index"]).to_pylist()
    assert Counter((row["document_id"], row["index"]) for row in rows) == Counter(
        (name, index) for name in documents for index in range(2)
    )
    assert not list(store.folder.glob(".*"))
