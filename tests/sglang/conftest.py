"""One SGLang server of a tiny Llama for all tests, started as ``generator=sglang`` starts it."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer

from gen.corpus.tokenizer import TokenizerConfig, train_bpe
from gen.serving.servers import GeneratorConfig, serving
from gen.serving.sglang import SglangConfig
from tests.gen.serving.target import Target
from tests.sglang.tiny_llama import CONTEXT, write_tiny_llama


def pytest_itemcollected(item: pytest.Item) -> None:
    """Only what hangs is ended: SGLang takes half a minute to start, or several on a busy core."""
    item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    write_tiny_llama(folder)
    return folder


@pytest.fixture(scope="session")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a running server."""
    config = GeneratorConfig(
        "sglang",
        model=str(tiny_llama),
        context_length=CONTEXT,
        threads=1,
        # A short queue, so that a test can fill it.
        sglang=SglangConfig(
            device="cpu", max_running_requests=16, arguments=["--max-queued-requests=32"]
        ),
    )
    body = {"model": config.model, "prompt": "the old town", "max_tokens": 1}
    with serving(config, tmp_path_factory.mktemp("server") / "server.log") as servers:
        for _ in range(2):  # a counter is shown once it has counted; the second prompt is cached
            httpx.post(f"{servers.urls[0]}/v1/completions", json=body, timeout=600)
        yield servers.urls[0]


@pytest.fixture
def target(server: str, tiny_llama: Path) -> Target:
    return Target(server, str(tiny_llama), CONTEXT, siblings=8)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Cuts documents for latent thoughts; rephrases need none."""
    return train_bpe(["the cat sat on the mat " * 20], TokenizerConfig(vocab_size=300))
