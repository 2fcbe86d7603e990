"""What a generation server must do for us. Against any running one:

    pytest -m server --server-url http://host:30000 --server-model NAME --server-context 8192 \\
        --server-siblings 32

Without a URL the embedded llama.cpp is asked; ``make test-sglang`` asks SGLang (tests/sglang/).
SGLang needs --enable-metrics --enable-cache-report.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest

from gen.client.answers import Completion, PromptTooLong
from gen.client.chat import ChatClient
from gen.client.connection import Connection
from gen.client.routing import Routing
from gen.corpus.documents import Document
from gen.corpus.tokenizer import TokenizerConfig, train_bpe
from gen.generations.job import run_job
from gen.prompts import MethodConfig
from gen.serving.load import parse_load
from gen.serving.servers import GeneratorConfig, check_model, serving
from tests.conftest import wait_until
from tests.gen.serving.target import Target

pytestmark = pytest.mark.server
WORDS = [
    "the",
    "harbour",
    "lies",
    "below",
    "the",
    "old",
    "town",
    "and",
    "its",
    "lights",
    "are",
    "seen",
    "from",
    "far",
    "out",
    "at",
    "sea",
]


def text_of(words: int, start: int = 0) -> str:
    """Different starts share no prefix."""
    return f"Note {start}: " + " ".join(WORDS[(i * i + start) % len(WORDS)] for i in range(words))


def with_client(
    target: Target, use: Callable[[ChatClient], Coroutine[Any, Any, Any]], **extra_body: Any
) -> Any:
    async def run() -> Any:
        routing = Routing([target.url], 60.0)
        async with ChatClient(routing, target.model, 64, 300.0, 2, extra_body=extra_body) as client:
            return await use(client)

    return asyncio.run(run())


async def chat(client: ChatClient, text: str, max_tokens: int, seed: int = 1) -> Completion:
    return await client.chat(
        "d0",
        [{"role": "user", "content": text}],
        max_tokens=max_tokens,
        temperature=1.0,
        top_p=1.0,
        seed=seed,
    )


def test_it_is_healthy_and_lists_its_model(target: Target) -> None:
    assert httpx.get(f"{target.url}/health", timeout=60.0).status_code == 200
    check_model(target.url, target.model, Connection())


def test_an_answer_has_text_reason_and_counts(target: Target) -> None:
    answer = with_client(target, lambda client: chat(client, "Tell me a long story.", 5))
    assert answer.text
    assert answer.finish_reason == "length"
    assert answer.completion_tokens == 5
    assert answer.prompt_tokens > 5


def test_plain_completions_without_a_chat_template(target: Target) -> None:
    async def plain(client: ChatClient) -> Completion:
        return await client.chat(
            "d0",
            [{"role": "user", "content": "The harbour lies below"}],
            template=False,
            max_tokens=4,
            temperature=1.0,
            top_p=1.0,
            seed=1,
        )

    answer = with_client(target, plain)
    assert answer.completion_tokens == 4
    assert answer.prompt_tokens < 10


def test_a_prompt_that_was_just_sent_comes_from_the_cache(target: Target) -> None:
    text = text_of(150, start=int(time.time()) % 10_000)

    async def twice(client: ChatClient) -> tuple[Completion, Completion]:
        return await chat(client, text, 1, seed=1), await chat(client, text, 1, seed=2)

    first, second = with_client(target, twice)
    assert first.cached_tokens < 0.5 * first.prompt_tokens
    assert second.cached_tokens >= 0.9 * second.prompt_tokens


def test_seeds_give_different_texts(target: Target) -> None:
    async def several(client: ChatClient) -> list[Completion]:
        return [await chat(client, "Write a sentence about a ship.", 16, seed) for seed in range(4)]

    answers = with_client(target, several)
    assert len({answer.text for answer in answers}) > 1


def test_a_prompt_longer_than_the_context_is_refused(target: Target) -> None:
    with pytest.raises(PromptTooLong):
        with_client(target, lambda client: chat(client, text_of(2 * target.context_length), 1))


def test_tokens_are_counted(target: Target) -> None:
    async def count(client: ChatClient) -> tuple[int, int]:
        return await client.count_tokens("d0", "one"), await client.count_tokens("d0", "one " * 50)

    short, long = with_client(target, count)
    assert 0 < short < 5
    assert 50 <= long <= 110


def test_its_queue_is_shown(target: Target) -> None:
    page = httpx.get(f"{target.url}/metrics", timeout=30.0)
    load = parse_load(page.text)
    assert load is not None
    assert load.waiting >= 0


def test_a_request_that_is_given_up_stops_running(target: Target) -> None:
    def running() -> float:
        load = parse_load(httpx.get(f"{target.url}/metrics", timeout=30.0).text)
        assert load is not None
        return load.running + load.waiting

    async def give_up(client: ChatClient) -> float:
        room = target.context_length - 100
        request = asyncio.create_task(chat(client, "Count from one to ten thousand.", room))
        deadline = time.monotonic() + 60
        while (seen := await asyncio.to_thread(running)) == 0 and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        request.cancel()
        return seen

    # A random model may end its answer at once, before the server has counted it.
    assert with_client(target, give_up, ignore_eos=True) > 0
    wait_until(lambda: running() == 0, seconds=60)


def test_the_prompts_of_siblings_come_from_the_cache(target: Target, tmp_path: Path) -> None:
    """The goal for rephrases: at least 0.97 (G - 1) / G of all prompt tokens."""
    generations = 8
    method = MethodConfig(prompt="{text}\n\nSay it again.", generations=generations, max_tokens=4)
    config = GeneratorConfig(
        "openai",
        model=target.model,
        urls=[target.url],
        context_length=target.context_length,
        concurrency=max(2, target.siblings),
        siblings_in_flight=target.siblings,
    )
    documents = [Document(f"d{i}", text_of(120, start=i + 20_000)) for i in range(4)]
    tokenizer = train_bpe([], TokenizerConfig(vocab_size=257))
    session = run_job(method, config, documents, tokenizer, tmp_path, serving)
    assert session.generations == generations * len(documents)
    assert session.cached_share >= 0.97 * (generations - 1) / generations
