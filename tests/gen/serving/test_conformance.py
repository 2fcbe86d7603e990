"""What a generation server must do for us. Against any running one:

    pytest -m server --server-url http://host:30000 --server-model NAME --server-context 8192 \\
        --server-siblings 32

Without a URL the embedded llama.cpp is asked; ``make test-sglang`` asks SGLang (tests/sglang/).
SGLang needs --enable-metrics --enable-cache-report.
"""

import asyncio
import time
import uuid
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
from gen.serving.load import parse_load, read_samples
from gen.serving.servers import GeneratorConfig, check_model, serving
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


# What a server has written since its start: counted as it writes, or at the end of an answer.
GENERATED = (
    "sglang:generation_tokens_total",
    "vllm:generation_tokens_total",
    "llamacpp:tokens_predicted_total",
)


def fresh_text(words: int) -> str:
    """A text that shares no prefix with any other, of this run or an earlier one."""
    start = uuid.uuid4().int % 10**12
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
    answer = with_client(
        target, lambda client: chat(client, "Tell me a long story.", 5), **target.full_length
    )
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

    answer = with_client(target, plain, **target.full_length)
    assert answer.completion_tokens == 4
    assert answer.prompt_tokens < 10


def test_a_prompt_that_was_just_sent_comes_from_the_cache(target: Target) -> None:
    text = fresh_text(150)

    async def twice(client: ChatClient) -> tuple[Completion, Completion]:
        return await chat(client, text, 1, seed=1), await chat(client, text, 1, seed=2)

    first, second = with_client(target, twice)
    assert first.cached_tokens < 0.5 * first.prompt_tokens
    assert second.cached_tokens >= 0.9 * second.prompt_tokens


def test_seeds_give_different_texts(target: Target) -> None:
    async def several(client: ChatClient) -> list[Completion]:
        return [await chat(client, "Write a sentence about a ship.", 16, seed) for seed in range(4)]

    answers = with_client(target, several, **target.sample)
    assert len({answer.text for answer in answers}) > 1


def test_a_prompt_longer_than_the_context_is_refused(target: Target) -> None:
    with pytest.raises(PromptTooLong):
        with_client(target, lambda client: chat(client, fresh_text(2 * target.context_length), 1))


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


def test_requests_that_are_given_up_stop_running(target: Target) -> None:
    """A server that ran them to their end would write all of their tokens, and count them."""
    room, count = target.context_length - 100, 6

    def page() -> str:
        return httpx.get(f"{target.url}/metrics", timeout=60.0).text

    def generated() -> float:
        return sum(read_samples(page(), GENERATED).values())

    def busy() -> bool:
        load = parse_load(page())
        assert load is not None
        return load.running + load.waiting > 0

    async def give_up(client: ChatClient) -> bool:
        texts = [f"Count from {number} to ten thousand." for number in range(count)]
        requests = [asyncio.create_task(chat(client, text, room)) for text in texts]
        while not await asyncio.to_thread(busy):  # SGLang tells every 40 tokens
            await asyncio.sleep(0.05)
        for request in requests:
            request.cancel()
        answers = await asyncio.gather(*requests, return_exceptions=True)
        return all(isinstance(answer, asyncio.CancelledError) for answer in answers)

    before = generated()
    assert with_client(target, give_up, **target.full_length), "answered before they were given up"
    while busy():
        time.sleep(3)  # llama.cpp looks after clients once it has answered nobody for a second
    assert generated() - before < 0.75 * count * room


@pytest.mark.slow
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
    documents = [Document(f"d{i}", fresh_text(120)) for i in range(4)]
    tokenizer = train_bpe([], TokenizerConfig(vocab_size=257))
    session = run_job(method, config, documents, tokenizer, tmp_path, serving)
    assert session.generations == generations * len(documents)
    assert session.cached_share >= 0.97 * (generations - 1) / generations
