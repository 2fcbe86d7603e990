"""A real generation server with real weights, shared by the tests of ``gen``."""

from collections.abc import Iterator

import pytest
from tokenizers import Tokenizer

from gen.corpus.tokenizer import TokenizerConfig, train_bpe
from gen.serving.servers import GeneratorConfig, embedded_server

CONTEXT_LENGTH = 512


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of llama.cpp's HTTP server: four slots, one thread beside the other test process."""
    config = GeneratorConfig(context_length=CONTEXT_LENGTH, concurrency=4, threads=1)
    with embedded_server(config, tmp_path_factory.mktemp("server") / "server.log") as running:
        yield running.url


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Cuts documents for latent thoughts; rephrases need none."""
    return train_bpe(["the cat sat on the mat " * 20], TokenizerConfig(vocab_size=300))
