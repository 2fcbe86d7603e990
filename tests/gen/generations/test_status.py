"""Status, from the stores alone: done, missing, failed, speed, cost."""

import re
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from gen.corpus.documents import Document
from gen.generations.job import run_job
from gen.generations.sessions import Session, latest_of_writers, read_sessions
from gen.generations.status import status
from gen.generations.store import Generation, GenerationStore, owns
from gen.prompts import MethodConfig
from gen.serving.servers import GeneratorConfig, serving

DOCUMENTS = [Document(f"d{i}", f"The {i}th boat came home late.") for i in range(6)]


def row(document: str, index: int) -> Generation:
    return Generation(
        document, "faq", index, "t", "m", "v", 1.0, 1.0, 9, 0, "stop", 50, 100, 40, False
    )


def store_of(root: Path) -> GenerationStore:
    store = GenerationStore.of_method(root, "faq", 2)
    store.claim({"model": "m"})
    return store


def test_nothing_yet(tmp_path: Path) -> None:
    assert status(tmp_path).endswith("no generations yet")
    store_of(tmp_path)
    assert status(tmp_path).endswith("faq: empty")


def test_progress_speed_and_cost_of_two_writers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(tmp_path)
    store.append([row("a", 0), row("a", 1)], 0)
    store.append([row("b", 0)], 1)
    now = time.time()
    sessions = [
        # An earlier division of the work costs, but what it owed is not what is owed now.
        Session(0, 1, 9, 0, gpus=8, began=now - 9000, generations=1, completion_tokens=100),
        Session(0, 2, 5, 1, gpus=8, began=now - 3600, generations=1, completion_tokens=3600),
    ]
    for session in sessions:
        session.save(store.folder)
    told = status(tmp_path)
    assert "3 generations of 2 documents, 300 tokens, 0% cut off" in told
    assert "60.0% done, 2 missing, 0 failed; writers that have not begun and are not cou" in told
    assert re.search(r"  writer 0 of 2 is running on \S+\n", told)
    Session(
        *(1, 2, 7, 0, 8),
        began=now - 3600,
        generations=1,
        completion_tokens=7200,
        prompt_tokens=1000,
        cached_tokens=900,
        restarts=2,
        ended="stopped by SIGTERM",
    ).save(store.folder)
    told = status(tmp_path)
    assert re.search(r"  writer 0 of 2 is running on \S+, writer 1 of 2 stopped by SIGTERM\n", told)
    with monkeypatch.context() as later:
        later.setattr("gen.generations.status.ACTIVE", 0.0)
        assert "writer 0 of 2 was cut off, last heard of 0:00:00 ago on " in status(tmp_path)
    assert "25.0% done, 9 missing, 0 failed\n" in told
    assert "90.0% of 1,000 prompt tokens from the cache, 3 tokens/s now" in told
    assert "4:30:00 left at that speed" in told  # 9 at 2 an hour
    assert "4.50 hours, 36.00 GPU-hours, 8 tokens per GPU-hour, 3 sessions, 2 server" in told
    assert [session.writer for session in latest_of_writers(read_sessions(store.folder))] == [0, 1]


def test_a_real_job_is_told_as_it_went(server: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    method = MethodConfig("faq", prompt="Ask about: {text}", generations=3, max_tokens=4)

    def run(writer: int, documents: list[Document]) -> None:
        config = GeneratorConfig(
            "openai", urls=[server], concurrency=2, writer=writer, writers=2, gpus=1
        )
        run_job(method, config, documents, tokenizer, tmp_path, serving)

    mine = [document for document in DOCUMENTS if owns(document.id, 0, 2)]
    assert 0 < len(mine) < len(DOCUMENTS)
    run(0, DOCUMENTS)
    assert "100.0% done, 0 missing, 0 failed; writers that have not begun" in status(tmp_path)
    run(1, DOCUMENTS[:-1])
    run(1, DOCUMENTS)
    told = status(tmp_path)
    assert f"{3 * len(DOCUMENTS)} generations of {len(DOCUMENTS)} documents" in told
    assert "100.0% done, 0 missing, 0 failed\n" in told
    assert "GPU-hours" in told
    session = read_sessions(tmp_path / "generations" / "faq")[0]
    assert session.generations == 3 * len(mine)
    assert session.cached_tokens > 0.4 * session.prompt_tokens
    table = GenerationStore(tmp_path / "generations" / "faq").read(["prompt_tokens"])
    everything = sum(one.prompt_tokens for one in read_sessions(tmp_path / "generations" / "faq"))
    assert everything == sum(table["prompt_tokens"].to_pylist())


def test_a_finished_job_leaves_no_session(
    server: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    method = MethodConfig("faq", prompt="Ask about: {text}", generations=1, max_tokens=2)
    config = GeneratorConfig("openai", urls=[server], concurrency=2)
    for _ in range(2):
        run_job(method, config, DOCUMENTS[:2], tokenizer, tmp_path, serving)
    assert len(read_sessions(tmp_path / "generations" / "faq")) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_sessions_survive_being_written(tmp_path: Path, count: int) -> None:
    sessions = [Session(writer, count, 1, 0, 0) for writer in range(count)]
    for session in sessions:
        session.save(tmp_path)
    assert sorted(read_sessions(tmp_path), key=lambda one: one.writer) == sessions
