"""The job and the streams on the real SGLang: agreement to the token, cached share, kills."""

import contextlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
from tokenizers import Tokenizer

from gen.client.routing import ServersLost
from gen.corpus.documents import Document, load_split
from gen.generations.job import run_job
from gen.generations.sessions import Session
from gen.generations.store import GenerationStore
from gen.prompts import MethodConfig
from gen.serving.load import read_samples
from gen.serving.servers import GeneratorConfig, embedded_server, serving
from gen.serving.supervisor import free_port
from tests.conftest import REPOSITORY, run_script, wait_until
from tests.gen.generations.faults import faulty
from tests.gen.serving.target import Target
from tests.gen.serving.test_conformance import fresh_text

PROMPT = "{text}\n\nSay it again in other words."
COUNTERS = ("sglang:prompt_tokens_total", "sglang:cached_tokens_total")
GENERATED = "sglang:generation_tokens_total"


def job(
    target: Target,
    tokenizer: Tokenizer,
    root: Path,
    documents: list[Document],
    generations: int,
    max_tokens: int = 4,
    **options: object,
) -> Session:
    method = MethodConfig(prompt=PROMPT, generations=generations, max_tokens=max_tokens)
    config = GeneratorConfig(
        "openai",
        model=target.model,
        urls=[target.url],
        context_length=target.context_length,
        **{"concurrency": 8, "siblings_in_flight": 8, **options},  # type: ignore[arg-type]
    )
    return run_job(method, config, documents, tokenizer, root, serving)


def counters(target: Target) -> Counter[str]:
    """What the server has counted since its start."""
    page = httpx.get(f"{target.url}/metrics", timeout=30.0).text
    wanted = (*COUNTERS, GENERATED)
    missing = [name for name in wanted if f"\n{name}{{" not in page]
    assert not missing, f"this SGLang has no counter {missing}"
    return Counter({name: round(value) for name, value in read_samples(page, wanted).items()})


def fresh_documents(count: int, words: int = 120) -> list[Document]:
    """Texts that no earlier test has put into the server's cache."""
    return [Document(f"d{i}", fresh_text(words)) for i in range(count)]


@pytest.mark.parametrize(
    ("generations", "siblings", "warm_up"),
    [(1, 1, True), (3, 1, True), (4, 4, True), (4, 4, False), (5, 2, True)],
)
def test_the_clients_tokens_are_the_servers(
    target: Target,
    tokenizer: Tokenizer,
    tmp_path: Path,
    generations: int,
    siblings: int,
    warm_up: bool,
) -> None:
    before = counters(target)
    options = {"siblings_in_flight": siblings, "warm_up": warm_up}
    session = job(target, tokenizer, tmp_path, fresh_documents(3), generations, 4, **options)
    warm_ups = session.requests - session.generations  # one token each, not kept
    assert warm_ups == (3 if siblings > 1 and warm_up else 0)
    counted = counters(target)
    counted.subtract(before)
    assert counted == {
        "sglang:prompt_tokens_total": session.prompt_tokens,
        "sglang:cached_tokens_total": session.cached_tokens,
        "sglang:generation_tokens_total": session.completion_tokens + warm_ups,
    }


@pytest.mark.parametrize("generations", [2, 8, 32])
def test_siblings_share_their_prompt(
    target: Target, tokenizer: Tokenizer, tmp_path: Path, generations: int
) -> None:
    session = job(target, tokenizer, tmp_path, fresh_documents(4), generations, 2)
    assert session.cached_share >= 0.97 * (generations - 1) / generations


def test_a_document_longer_than_the_context_is_cut(
    target: Target, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (document,) = fresh_documents(1, words=2 * target.context_length)
    session = job(target, tokenizer, tmp_path, [document], 2)
    rows = GenerationStore(tmp_path / "generations" / "rephrase").read().to_pylist()
    assert [row["truncated"] for row in rows] == [True, True]
    longest = session.prompt_tokens / session.requests
    assert 0.97 * target.context_length < longest <= target.context_length - 4


def test_a_full_queue_costs_nothing_but_time(
    target: Target, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The server takes 16 requests, lets 32 wait and refuses the others with 503."""
    documents = fresh_documents(120, words=10)
    options = {"concurrency": 120, "siblings_in_flight": 1}
    session = job(target, tokenizer, tmp_path, documents, 1, 24, **options)
    assert session.generations == 120
    rows = GenerationStore(tmp_path / "generations" / "rephrase").read(["document_id"])
    assert len(set(rows["document_id"].to_pylist())) == 120


def test_a_server_that_comes_back_as_an_sglang_of_another_model_is_refused(
    target: Target, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """SGLang answers to any model's name; what it lists tells."""
    port, ready, done = free_port(), threading.Event(), threading.Event()
    store = GenerationStore(tmp_path / "generations" / "rephrase")
    first = GeneratorConfig(model="another", context_length=512, concurrency=1, threads=1)

    def restart() -> None:
        with (
            embedded_server(first, tmp_path / "log") as running,
            faulty(running.url, [], port=port),
        ):
            ready.set()
            wait_until(lambda: bool(store.parts()), seconds=3000)
        with faulty(target.url, [], port=port):
            done.wait(3000)

    thread = threading.Thread(target=restart)
    thread.start()
    try:
        ready.wait()
        before = Target(f"http://127.0.0.1:{port}", first.model, 512, 1)
        options = {"concurrency": 1, "siblings_in_flight": 1, "flush_seconds": 0.1}
        with pytest.raises(ServersLost, match=r"came back and serves .*, not generator\.model="):
            job(before, tokenizer, tmp_path, fresh_documents(20, words=9), 500, 16, **options)
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("method", ["rephrase", "faq", "wrap_easy", "latent"])
def test_documents_become_streams(target: Target, tmp_path: Path, method: str) -> None:
    run_script(
        *("generate.py", "scale=demo", f"method={method}", f"root={tmp_path}"),
        *("corpus.max_documents=24", "corpus.max_characters=700", "corpus.held_out=0.25"),
        *("tokenizer.vocab_size=400", "method.generations=2", "method.max_tokens=6"),
        *("generator=openai", f"generator.model={target.model}", f"generator.urls=[{target.url}]"),
        "generator.context_length=4096",
        timeout=3000,
    )
    suffix = "" if method in ("rephrase", "latent") else f"-{method}"
    kinds = ["latent"] if method == "latent" else ["simple", "stitched"]
    for kind in kinds:
        assert (tmp_path / "streams" / f"{kind}-g2{suffix}" / "manifest.json").exists()


# ---- kills ----


def descendants(client: int, title: str) -> list[psutil.Process]:
    """The client's living processes whose command line holds ``title``, parents first."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(client).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if title in " ".join(process.cmdline()):
                    found.append(process)
    return found


def server_of(client: int) -> psutil.Process | None:
    """SGLang itself: below its guard, whose command line holds the server's."""
    return next(iter(descendants(client, "sglang.launch_server")[1:]), None)


VICTIMS: dict[str, Callable[[int], list[psutil.Process]]] = {
    "scheduler": lambda client: descendants(client, "sglang::scheduler"),
    "detokenizer": lambda client: descendants(client, "sglang::detokenizer"),
    "server": lambda client: descendants(client, "sglang.launch_server")[1:],
    "client": lambda client: [psutil.Process(client)],
}


class DisturbedJob:
    """A job on an SGLang of its own, and the texts that it has stored.

    Nothing here waits for a moment that can pass unseen: a process is struck once its server has
    written so many texts more, and a job that ends before is given more of them to write.
    """

    def __init__(self, root: Path, model: Path) -> None:
        self.log = root / "client.log"
        self.store = GenerationStore(root / "generations" / "rephrase")
        self.generations = 40
        self.struck: psutil.Process | None = None
        self.client: subprocess.Popen[bytes] | None = None
        self.options = [
            *("scale=demo", f"root={root}", "corpus.max_documents=60", "corpus.max_characters=900"),
            *("tokenizer.vocab_size=400", "method.max_tokens=24", "generator=sglang"),
            *(f"generator.model={model}", "generator.sglang.device=cpu", "generator.threads=1"),
            *("generator.context_length=4096", "generator.concurrency=4"),
            *("generator.adaptive=false", "generator.siblings_in_flight=4"),
            # A request that meets three kills in a row is not given up.
            *("generator.flush_seconds=0.2", "generator.restarts=50", "generator.attempts=1000"),
        ]

    def start(self) -> subprocess.Popen[bytes]:
        """The command of a user, for as many generations of each document as are wanted now."""
        command = [sys.executable, "generate.py", "generate", *self.options]
        with self.log.open("ab") as log:
            self.client = subprocess.Popen(
                [*command, f"method.generations={self.generations}"],
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
            )
        return self.client

    def keys(self) -> Counter[tuple[str, int]]:
        if not self.store.parts():
            return Counter()
        rows = self.store.read(["document_id", "index"]).to_pylist()
        return Counter((row["document_id"], row["index"]) for row in rows)

    def working(self) -> subprocess.Popen[bytes]:
        """The client, started again where it was killed or had no more to do."""
        if self.client is not None and self.client.poll() is None:
            return self.client
        if self.client is not None and self.client.returncode != -signal.SIGKILL:
            self.require_success()
            self.generations += 40
        return self.start()

    def require_success(self) -> None:
        assert self.client is not None
        assert self.client.wait() == 0, self.log.read_text(errors="replace")[-3000:]

    def strike(self, victim: str, texts: int) -> None:
        """SIGKILL ``victim`` when a server that was not struck yet has written ``texts``."""
        wanted = None
        while True:
            client = self.working()
            server = server_of(client.pid)
            if server is not None and server != self.struck:
                stored = self.keys().total()
                wanted = stored + texts if wanted is None else wanted
                if stored >= wanted and (found := VICTIMS[victim](client.pid)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        found[0].kill()
                        self.struck = server
                        return
            time.sleep(0.1)

    def finish(self) -> None:
        if self.working().wait() == -signal.SIGKILL:  # the last to be struck
            self.start()
        self.require_success()


@pytest.mark.timeout(4 * 3600)
def test_kills_lose_and_double_nothing(
    tiny_llama: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """SIGKILL of every process in turn, at random moments; with --kills=20 the full number."""
    kills = pytestconfig.getoption("--kills")
    chooser = random.Random(kills)
    job = DisturbedJob(tmp_path, tiny_llama)
    for kill in range(kills):
        job.strike(list(VICTIMS)[kill % len(VICTIMS)], texts=chooser.randint(1, 40))
    job.finish()
    names = [document.id for document in load_split(tmp_path, "train")]
    assert job.keys() == Counter(
        (name, index) for name in names for index in range(job.generations)
    )
    assert not list(job.store.folder.glob(".*"))
