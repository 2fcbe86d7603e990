"""A job told to stop stores what was answered, and the same command asks for the rest."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tokenizers import Tokenizer

from gen.corpus.documents import Document
from gen.generations import job
from gen.generations.failures import all_failures
from gen.generations.job import run_job
from gen.generations.store import GenerationStore
from gen.prompts import MethodConfig
from gen.serving.servers import GeneratorConfig, Servers, serving
from gen.serving.supervisor import ServerFailed
from tests.conftest import REPOSITORY, TINY, wait_until
from tests.gen.generations.faults import Faults, faulty
from trainer.stop import Stopped


def program(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "generate.py", *TINY, *words],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def keys(store: GenerationStore) -> Counter[tuple[str, int]]:
    rows = store.read(["document_id", "index"]).to_pylist()
    return Counter((row["document_id"], row["index"]) for row in rows)


@pytest.mark.slow
def test_what_was_answered_is_stored(server: str, tmp_path: Path) -> None:
    """Nothing would be written for 1,000 s, and requests are in flight when the signal comes."""
    words = ["method.generations=40", "generator.flush_seconds=1000", "generator.concurrency=2"]
    words += [f"root={tmp_path}", "generator=openai", "generator.model=SmolLM2-135M-Instruct"]
    store = GenerationStore(tmp_path / "generations" / "rephrase")
    before = 0
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        with (
            faulty(server, []) as url,
            program(*words, f"generator.urls=[{url}]", "generator.context_length=512") as process,
        ):
            wait_until(lambda: Faults.answered.count(10) > 5)
            process.send_signal(number)
            output, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number, errors
        stored = keys(store)
        assert stored.total() == len(stored) == before + Faults.answered.count(10)
        before = len(stored)
        assert output.splitlines()[-1] == (
            f"{store.folder}: stopped after {before} of 400 generations; the same command goes "
            f"on, by {number.name}"
        )
        assert "Traceback" not in errors
        assert not all_failures(store.folder)


def test_a_job_that_is_requeued_twice_for_nothing_ends(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def dead(config: GeneratorConfig, log: Path) -> Iterator[Servers]:
        raise ServerFailed("it does not start")
        yield

    method = MethodConfig(prompt="Rewrite: {text}", generations=2, max_tokens=4)
    documents = [Document("d0", "The cat sat on the mat.")]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for restarts, problem in enumerate(
        ["does not start", "does not start", "of job 7 added nothin"]
    ):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        with pytest.raises(ValueError, match=problem):
            run_job(method, GeneratorConfig(), documents, tokenizer, tmp_path, dead)


@pytest.mark.slow
def test_a_job_whose_server_is_told_to_stop_as_well_goes_on_later(tmp_path: Path) -> None:
    """Slurm signals all processes of a job at once."""
    words = ["method.generations=6", "generator.flush_seconds=0.2", f"root={tmp_path}"]
    store = GenerationStore(tmp_path / "generations" / "rephrase")
    with program(*words) as process:
        wait_until(lambda: bool(store.parts()))
        family = psutil.Process(process.pid).children(recursive=True)
        for member in (psutil.Process(process.pid), *family):
            member.terminate()
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "generations; the same command goes on, by SIGTERM" in output
    assert "restart" not in errors
    assert not psutil.wait_procs(family, timeout=30)[1]
    before = keys(store).total()
    assert 0 < before < 6 * 10
    with program(*words) as process:
        output, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert f"rephrase: {6 * 10 - before} generations" in output
    assert keys(store) == Counter(dict.fromkeys(keys(store), 1))
    assert keys(store).total() == 6 * 10


def test_a_server_that_starts_is_not_waited_for(tmp_path: Path) -> None:
    with program(f"root={tmp_path}") as process:
        wait_until(lambda: (tmp_path / "generations" / "server-0.log").exists())
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert output.splitlines()[-1].endswith("the same command goes on, by SIGTERM")


def test_requests_that_are_not_answered_in_time_are_dropped(
    server: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "GRACE", 0.3)
    method = MethodConfig(prompt="Rewrite: {text}", generations=2, max_tokens=4)
    documents = [Document(f"d{number}", "The cat sat on the mat.") for number in range(2)]
    with faulty(server, [None, *["timeout"] * 9]) as url:

        def stop() -> None:
            wait_until(lambda: len(Faults.faults) < 9)
            os.kill(os.getpid(), signal.SIGUSR1)

        thread = threading.Thread(target=stop)
        thread.start()
        config = GeneratorConfig("openai", urls=[url], concurrency=1)
        with pytest.raises(Stopped, match=r"rephrase: stopped after 1 of 4 generations.*SIGUSR1"):
            run_job(method, config, documents, tokenizer, tmp_path, serving)
        thread.join()
    store = GenerationStore(tmp_path / "generations" / "rephrase")
    assert store.done(documents) == [{0}, set()]
    assert not all_failures(store.folder)


@pytest.mark.slow
def test_a_stream_that_is_being_built_is_gone_on_with(tmp_path: Path) -> None:
    source = tmp_path / "texts.jsonl"
    numbers = range(20_000)  # a second or two of building
    lines = (f"{number} {' '.join(map(str, range(number, number + 30)))}" for number in numbers)
    source.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    root = tmp_path / "root"
    words = ["task=corpus", "corpus=jsonl", f"corpus.path={source}", f"root={root}"]
    words += ["corpus.max_documents=null", "corpus.max_characters=null", "streams.shard_bytes=9999"]
    with program(*words) as process:
        wait_until(lambda: any((root / "streams").glob(".real.*/stream/*.mds")))
        process.send_signal(signal.SIGUSR2)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGUSR2, errors
    assert output.splitlines()[-1] == f"{root}: stopped; the same command goes on, by SIGUSR2"
    assert [path.name[:6] for path in (root / "streams").iterdir()] == [".real."]
    with program(*words) as process:
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert {path.name for path in (root / "streams").iterdir()} == {"real", "val"}
