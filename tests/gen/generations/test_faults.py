"""Faults on real sockets and real processes: nothing is lost, repeated or half-written."""

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from gen.client import chat as client
from gen.client.answers import GenerationFailed
from gen.client.chat import ChatClient
from gen.client.routing import Routing, ServersLost
from gen.corpus.documents import CorpusConfig, Document, load_split
from gen.corpus.tokenizer import TokenizerConfig
from gen.generations.failures import all_failures
from gen.generations.job import run_job
from gen.generations.status import status
from gen.generations.store import GenerationStore
from gen.pipeline import GenerateConfig, generate
from gen.prompts import MethodConfig
from gen.serving import supervisor
from gen.serving.servers import GeneratorConfig, Servers, embedded_server, serving
from gen.serving.supervisor import ServerFailed, SupervisedServer, free_port
from tests.conftest import REPOSITORY, TINY, run_script, wait_until
from tests.gen.generations import faults
from tests.gen.generations.faults import FILTERED, PASSING, POISON, THOUGHTFUL, Faults, faulty

REPHRASE = MethodConfig(prompt="Rewrite in other words: {text}", generations=3, max_tokens=8)
MODEL = "SmolLM2-135M-Instruct"
DOCUMENTS = [Document(f"d{i}", f"The {i}th cat sat on the mat and slept.") for i in range(8)]
ALL_KEYS = Counter((document.id, index) for document in DOCUMENTS for index in range(3))


def keys(store: GenerationStore) -> Counter[tuple[str, int]]:
    rows = store.read(["document_id", "index"]).to_pylist()
    return Counter((row["document_id"], row["index"]) for row in rows)


def ask(url: str, attempts: int, outage: float = 60.0, timeout: float = 30.0) -> str:
    async def chat() -> str:
        async with ChatClient(Routing([url], outage), MODEL, 2, timeout, attempts) as client:
            messages = [{"role": "user", "content": "Say something."}]
            answer = await client.chat(
                "d0", messages, max_tokens=5, temperature=1.0, top_p=1.0, seed=1
            )
            return answer.text

    return asyncio.run(chat())


@pytest.mark.parametrize("fault", PASSING)
def test_passing_faults_are_retried(server: str, fault: str) -> None:
    timeout = 1.0 if fault == "timeout" else 30.0
    with faulty(server, [fault]) as url:
        assert ask(url, attempts=3, timeout=timeout) == ask(server, attempts=1)


def test_half_a_character_can_be_stored(server: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with faulty(server, ["surrogate"]) as url:
        config = GeneratorConfig("openai", urls=[url], concurrency=1)
        run_job(REPHRASE, config, DOCUMENTS[:1], tokenizer, tmp_path, serving)
    texts = GenerationStore(tmp_path / "generations" / "rephrase").read()["text"].to_pylist()
    assert len(texts) == 3
    assert texts[0] == "half \ufffd"


def test_answers_without_counts_are_kept(server: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with faulty(server, ["uncounted"]) as url:
        config = GeneratorConfig("openai", urls=[url], concurrency=1)
        session = run_job(REPHRASE, config, DOCUMENTS[:1], tokenizer, tmp_path, serving)
    rows = GenerationStore(tmp_path / "generations" / "rephrase").read().to_pylist()
    assert [row["completion_tokens"] is None for row in rows] == [True, False, False]
    assert (session.uncounted, session.generations) == (1, 3)
    assert "1 answers without counts" in status(tmp_path)


def test_thinking_is_no_text_and_gets_room(
    server: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    documents = [DOCUMENTS[0], Document("deep", f"This is {THOUGHTFUL.decode()}.")]
    store = GenerationStore(tmp_path / "generations" / "rephrase")
    with faulty(server, []) as url:
        config = GeneratorConfig("openai", urls=[url], concurrency=1)
        with pytest.raises(GenerationFailed, match=r"3 still thinking.*enable_thinking=false"):
            run_job(REPHRASE, config, documents, tokenizer, tmp_path, serving)
        assert set(keys(store)) == {("d0", index) for index in range(3)}
        roomy = replace(config, thinking_tokens=100)
        session = run_job(REPHRASE, roomy, documents, tokenizer, tmp_path, serving)
    rows = [row for row in store.read().to_pylist() if row["document_id"] == "deep"]
    assert [row["text"] for row in rows] == ["The rewritten text."] * 3
    assert (session.thoughts, session.requests) == (4, 4)  # the first was asked for twice
    assert session.thinking_tokens > 8 + 3 * 5
    assert "before 7 answers, not kept" in status(tmp_path)
    assert not all_failures(store.folder)


@pytest.mark.slow
def test_a_document_that_can_never_be_generated_does_not_block_the_streams(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"The {number}th harbour lies below the old town." for number in range(39)]
    lines = [{"text": text} for text in [*texts, f"This is {FILTERED.decode()}."]]
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    root = tmp_path / "root"
    with faulty(server, []) as url:
        config = GenerateConfig(
            root=str(root),
            corpus=CorpusConfig("jsonl", str(source), held_out=0.2),
            tokenizer=TokenizerConfig(vocab_size=300),
            method=MethodConfig(prompt="{text} Say it again.", generations=1, max_tokens=4),
            generator=GeneratorConfig("openai", urls=[url], context_length=512, concurrency=4),
        )
        with pytest.raises(GenerationFailed, match=r"1 generations of 1 documents.* 1 filtered"):
            generate(config)
        assert "1 failed (1 filtered)" in status(root)
        config.streams.missing = "allow"
        with pytest.raises(ValueError, match=r"more than streams\.missing_share=1\.00%"):
            generate(config)
        config.streams.missing_share = 0.1
        generate(config)
        assert "generations are missing (1 filtered)" in capsys.readouterr().out
        for stream in ("simple-g1", "stitched-g1"):
            manifest = json.loads((root / "streams" / stream / "manifest.json").read_text())
            assert [one["reasons"] for one in manifest["missing"]] == [{"filtered": 1}]
        config.task, config.streams.missing = "streams", "refuse"
        with pytest.raises(ValueError, match="1 documents have fewer than G=1 generations"):
            generate(config)


@pytest.mark.slow
def test_lasting_faults_are_reported(server: str) -> None:
    with (
        faulty(server, ["500"] * 9) as url,
        pytest.raises(GenerationFailed, match="2 attempts failed, the last with HTTP 500"),
    ):
        ask(url, attempts=2)
    with faulty(server, ["401"]) as url, pytest.raises(GenerationFailed, match="HTTP 401"):
        ask(url, attempts=5)
    with pytest.raises(ServersLost, match=r"no server has answered for 1 s.*ConnectorError"):
        ask("http://127.0.0.1:9", attempts=1, outage=1.0)
    with faulty(server, ["503"] * 99) as url, pytest.raises(ServersLost, match="HTTP 503"):
        ask(url, attempts=1, outage=1.0)


@pytest.mark.slow
def test_a_job_behind_a_bad_network_ends_complete(
    server: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.05)
    network = [*PASSING, *[None] * 9]
    random.Random(0).shuffle(network)
    with faulty(server, network) as url:
        config = GeneratorConfig(
            "openai", urls=[url], concurrency=6, timeout=2.0, attempts=12, flush_seconds=0.1
        )
        run_job(REPHRASE, config, DOCUMENTS[:5], tokenizer, tmp_path, serving)
        assert not Faults.faults
    found = keys(GenerationStore(tmp_path / "generations" / "rephrase"))
    assert found == Counter(
        (document.id, index) for document in DOCUMENTS[:5] for index in range(3)
    )


@pytest.mark.parametrize("siblings", [1, 3])
@pytest.mark.slow
def test_a_document_that_kills_servers_is_given_up_and_the_others_are_not(
    server: str,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    siblings: int,
) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.05)
    poison = Document("poison", f"This is {POISON.decode()}.")
    documents = [DOCUMENTS[0], poison, *DOCUMENTS[1:]]
    with faulty(server, []) as url:
        config = GeneratorConfig(
            "openai", urls=[url], concurrency=4, siblings_in_flight=siblings, flush_seconds=0.1
        )
        with pytest.raises(GenerationFailed, match=r"3 .*\(poison\)"):
            run_job(REPHRASE, config, documents, tokenizer, tmp_path, serving)
    store = GenerationStore(tmp_path / "generations" / "rephrase")
    assert keys(store) == ALL_KEYS
    reasons = Counter(failure.reason for failure in all_failures(store.folder).values())
    assert reasons == {"connection lost": 3}


def test_documents_of_a_lost_server_go_to_another(
    server: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with faulty(server, []) as url:
        owners: set[str] = set()
        while len(owners) < 2:
            lost = f"http://127.0.0.1:{free_port()}"
            routing = Routing([url, lost], 60.0)
            owners = {routing.order(document.id)[0] for document in DOCUMENTS}
        config = GeneratorConfig("openai", urls=[url, lost], concurrency=2)

        @contextlib.contextmanager
        def one_of_two(config: GeneratorConfig, log: Path) -> Iterator[Servers]:
            yield Servers(config.urls)  # one is not there

        run_job(REPHRASE, config, DOCUMENTS, tokenizer, tmp_path, one_of_two)
    assert keys(GenerationStore(tmp_path / "generations" / "rephrase")) == ALL_KEYS


@pytest.mark.slow
def test_documents_of_a_server_that_hangs_go_to_another(
    server: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "SLOW", 60.0)
    method = MethodConfig(prompt=REPHRASE.prompt, max_tokens=2, generations=1)
    with faulty(server, ["timeout"] * 99) as hanging:
        routing = Routing([server, hanging], 60.0)
        theirs = next(
            Document(f"d{number}", "The cat.")
            for number in range(999)
            if routing.order(f"d{number}")[0] == hanging
        )
        config = GeneratorConfig("openai", urls=[server, hanging], timeout=6.0, attempts=2)
        made = run_job(method, config, [theirs], tokenizer, tmp_path, serving)
    assert (made.generations, made.retries) == (1, 1)
    with faulty(server, ["timeout"] * 99) as url, pytest.raises(ServersLost, match="TimeoutError"):
        ask(url, attempts=9, outage=0.5, timeout=0.3)


@pytest.mark.slow
def test_an_attached_server_that_comes_back_is_waited_for(
    server: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    port, back, done = free_port(), threading.Event(), threading.Event()

    def outage() -> None:
        with faulty(server, [], port=port):
            time.sleep(1.0)
        time.sleep(1.5)
        with faulty(server, [], port=port):
            back.set()
            done.wait(60)

    thread = threading.Thread(target=outage)
    thread.start()
    try:
        time.sleep(0.3)
        config = GeneratorConfig("openai", urls=[f"http://127.0.0.1:{port}"], concurrency=1)
        method = MethodConfig(prompt=REPHRASE.prompt, generations=3, max_tokens=16)
        run_job(method, config, DOCUMENTS, tokenizer, tmp_path, serving)
        assert back.is_set()
    finally:
        done.set()
        thread.join()
    assert keys(GenerationStore(tmp_path / "generations" / "rephrase")) == ALL_KEYS


def test_a_server_that_comes_back_with_another_model_is_refused(
    server: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    port, again, done = free_port(), threading.Event(), threading.Event()
    store = GenerationStore(tmp_path / "generations" / "rephrase")

    def restart() -> None:
        with faulty(server, [], port=port):
            wait_until(lambda: bool(store.parts()))
        other = GeneratorConfig(model="another", context_length=256, concurrency=1, threads=1)
        with (
            embedded_server(other, tmp_path / "log") as running,
            faulty(running.url, [], port=port),
        ):
            again.set()
            done.wait(60)

    thread = threading.Thread(target=restart)
    thread.start()
    try:
        url = f"http://127.0.0.1:{port}"
        config = GeneratorConfig("openai", urls=[url], concurrency=1, flush_seconds=0.1)
        method = MethodConfig(prompt=REPHRASE.prompt, generations=40, max_tokens=16)
        with pytest.raises(ServersLost, match="came back and serves another, not"):
            run_job(method, config, DOCUMENTS, tokenizer, tmp_path, serving)
        assert again.is_set()
    finally:
        done.set()
        thread.join()


# ---- servers that are started here ----


def server_process(running: SupervisedServer) -> int:
    """The real server below its guard."""
    assert running.process is not None
    guard = running.process.pid
    return int(Path(f"/proc/{guard}/task/{guard}/children").read_text().split()[0])


def run_with_attack(
    tokenizer: Tokenizer, tmp_path: Path, restarts: int, attack: Callable[[SupervisedServer], None]
) -> int:
    """Run a job on its own embedded server, attack that once a part is stored; its restarts."""
    config = GeneratorConfig(
        context_length=256, concurrency=2, threads=1, flush_seconds=0.1, restarts=restarts
    )
    store = GenerationStore(tmp_path / "generations" / "rephrase")
    seen: list[SupervisedServer] = []

    def watch(running: SupervisedServer) -> None:
        while not store.parts():
            time.sleep(0.02)
        attack(running)

    @contextlib.contextmanager
    def attacked(config: GeneratorConfig, log: Path) -> Iterator[Servers]:
        with embedded_server(config, log) as running:
            seen.append(running)
            thread = threading.Thread(target=watch, args=(running,))
            thread.start()
            yield Servers([running.url], lambda: running.failure, lambda: running.restarted)
            thread.join()

    run_job(REPHRASE, config, DOCUMENTS, tokenizer, tmp_path, attacked)
    return seen[0].restarted


@pytest.mark.slow
def test_a_server_killed_in_the_middle_is_started_again(
    tokenizer: Tokenizer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    restarted = run_with_attack(
        tokenizer, tmp_path, 3, lambda running: os.kill(server_process(running), signal.SIGKILL)
    )
    assert restarted == 1
    assert keys(GenerationStore(tmp_path / "generations" / "rephrase")) == ALL_KEYS
    told = capfd.readouterr().err
    assert "the embedded server ended with status 137; its log" in told
    assert "restart 1 of 3" in told


@pytest.mark.slow
def test_a_server_that_hangs_is_started_again(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "HEALTH_EVERY", 0.2)
    monkeypatch.setattr(supervisor, "HEALTH_TIMEOUT", 0.5)
    restarted = run_with_attack(
        tokenizer, tmp_path, 3, lambda running: os.kill(server_process(running), signal.SIGSTOP)
    )
    assert restarted >= 1
    assert keys(GenerationStore(tmp_path / "generations" / "rephrase")) == ALL_KEYS


@pytest.mark.slow
def test_a_server_that_keeps_dying_ends_the_job_with_its_log(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ServersLost, match=r"ended with status 137 after 0 restarts[\s\S]*slot"):
        run_with_attack(
            tokenizer,
            tmp_path,
            0,
            lambda running: os.kill(server_process(running), signal.SIGKILL),
        )
    store = GenerationStore(tmp_path / "generations" / "rephrase")
    kept = keys(store)
    assert kept
    assert not kept - ALL_KEYS
    run_with_attack(tokenizer, tmp_path, 0, lambda running: None)  # what is missing
    assert keys(store) == ALL_KEYS


def test_a_server_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no such GPU'); raise SystemExit(3)"]
    running = SupervisedServer("test", command, free_port(), tmp_path / "log", 30.0, 3)
    with pytest.raises(ServerFailed, match=r"ended with status 3 before it was .*\nno such GPU"):
        running.__enter__()
    command = [sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(60)"]
    running = SupervisedServer("test", command, free_port(), tmp_path / "log2", 1.0, 3)
    with pytest.raises(ServerFailed, match=r"hangs before it was .*\nloading"):
        running.__enter__()
    assert not running.alive()


def test_a_killed_job_leaves_no_server_behind(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import time; from pathlib import Path\n"
        "from gen.serving.servers import GeneratorConfig, embedded_server\n"
        "config = GeneratorConfig(context_length=256, concurrency=1, threads=1)\n"
        "with embedded_server(config, Path(sys.argv[2]) / 'log') as server:\n"
        "    print(server.process.pid, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(REPOSITORY), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        group = int(job.stdout.readline())
        os.killpg(group, 0)
        job.kill()
    wait_until(lambda: not Path(f"/proc/{group}").exists(), seconds=30)  # the guard ends last
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)


@pytest.mark.slow
def test_sigkill_at_random_moments_loses_and_repeats_nothing(
    server: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    wanted = pytestconfig.getoption("--kills")
    generations = 2 + wanted // 4
    arguments = [
        *TINY,
        f"root={tmp_path}",
        f"method.generations={generations}",
        "generator=openai",
        f"generator.urls=[{server}]",
        "generator.model=SmolLM2-135M-Instruct",
        "generator.context_length=512",
        "generator.flush_seconds=0.1",
        "generator.merge_parts=3",
        "generator.concurrency=2",
    ]
    command = [sys.executable, "generate.py", "generate", *arguments]
    store = GenerationStore(tmp_path / "generations" / "rephrase")
    chooser = random.Random(wanted)
    kept: set[tuple[str, int]] = set()
    kills = 0
    for attempt in range(wanted):
        with subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            if attempt % 3:  # while it writes; else also while it starts, reads and claims
                parts, deadline = len(store.parts()), time.monotonic() + 60
                while len(store.parts()) == parts and process.poll() is None:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                time.sleep(chooser.uniform(0.0, 0.3))
            else:
                time.sleep(chooser.uniform(0.0, 4.0))
            kills += process.poll() is None
            process.kill()
        now = set(keys(store)) if store.parts() else set()
        assert kept <= now
        kept = now
    assert kills > wanted / 2
    run_script("generate.py", "generate", *arguments)
    documents = [document.id for document in load_split(tmp_path, "train")]
    assert keys(store) == Counter(
        (name, index) for name in documents for index in range(generations)
    )
    assert not list(store.folder.glob(".*"))
