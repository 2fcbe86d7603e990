"""The embedded generator's real model on SGLang: converted once, the same greedy tokens."""

import asyncio
from pathlib import Path

import pytest

from gen.client.chat import ChatClient
from gen.client.routing import Routing
from gen.serving.servers import EMBEDDED_MODEL, GeneratorConfig, serving
from gen.serving.sglang import SglangConfig

PROMPTS = [
    "Say hello.",
    "What is the capital of France?",
    "Rewrite in other words: The harbour lies below the old town.",
    "Name three colours.",
    "What does a lighthouse do?",
    "Count from one to ten.",
    "Write one sentence about the sea.",
    "What is two plus two?",
    "Explain what a compiler is in one sentence.",
    "Translate into French: good morning.",
]
TOKENS = 12


def greedy(url: str) -> list[str]:
    """Each prompt's most likely answer."""

    async def ask() -> list[str]:
        async with ChatClient(Routing([url], 60.0), EMBEDDED_MODEL, 1, 120.0, 2) as client:
            return [
                (
                    await client.chat(
                        "d0",
                        [{"role": "user", "content": prompt}],
                        max_tokens=TOKENS,
                        temperature=0.0,
                        top_p=1.0,
                        seed=1,
                    )
                ).text
                for prompt in PROMPTS
            ]

    return asyncio.run(ask())


@pytest.mark.timeout(900)
def test_the_converted_model_says_what_llama_cpp_says(tmp_path: Path) -> None:
    answers = []
    for config in (
        GeneratorConfig("embedded", context_length=512, concurrency=1),
        GeneratorConfig("sglang", context_length=512, sglang=SglangConfig(device="cpu")),
    ):
        with serving(config, tmp_path / f"{config.kind}.log") as servers:
            answers.append(greedy(servers.urls[0]))
    assert answers[0] == answers[1]
