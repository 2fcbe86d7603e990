"""A third real server, which has no /tokenize, no /metrics and no list of its local model.

It keeps no prompts either, and samples only where it is asked for that in a way of its own: it is
asked the conformance tests that this leaves.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from gen.corpus.documents import Document
from gen.generations.job import run_job
from gen.generations.store import GenerationStore
from gen.prompts import MethodConfig
from gen.serving.servers import GeneratorConfig, serving
from gen.serving.sglang_environment import folder
from gen.serving.supervisor import SupervisedServer, free_port
from tests.gen.serving.target import Target
from tests.gen.serving.test_conformance import (  # noqa: F401
    test_an_answer_has_text_reason_and_counts,
    test_plain_completions_without_a_chat_template,
    test_seeds_give_different_texts,
)

CONTEXT = 2048
SAMPLE = {"generation_config": '{"do_sample": true}'}


@pytest.fixture(scope="module")
def url(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of ``transformers serve``, without its /v1."""
    port = free_port()
    command = [
        *(str(folder("cpu") / "bin" / "transformers"), "serve", str(tiny_llama)),
        *("--device", "cpu", "--host", "127.0.0.1", "--port", str(port)),
    ]
    log = tmp_path_factory.mktemp("transformers") / "log"
    offline = {"HF_HUB_OFFLINE": "1"}
    with SupervisedServer("transformers", command, port, log, 600, 0, offline) as server:
        yield server.url


@pytest.fixture
def target(url: str, tiny_llama: Path) -> Target:
    return Target(url, str(tiny_llama), CONTEXT, siblings=2, sample=SAMPLE, full_length={})


def test_a_job_runs_on_transformers_serve(
    url: str, tiny_llama: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    documents = [Document("short", "The harbour lies below."), Document("long", "sea " * 4000)]
    for tokens_of in (None, str(tiny_llama)):  # estimated, and counted
        root = tmp_path / f"root-{tokens_of is None}"
        config = GeneratorConfig(
            "openai",
            model=str(tiny_llama),
            urls=[f"{url}/v1"],
            context_length=CONTEXT,
            concurrency=2,
            tokenizer=tokens_of,
        )
        method = MethodConfig(prompt="{text} Say it again.", generations=2, max_tokens=4)
        session = run_job(method, config, documents, tokenizer, root, serving)
        assert (session.generations, session.failed, session.uncounted) == (4, 0, 0)
        rows = GenerationStore(root / "generations" / "rephrase").read().to_pylist()
        longest = {row["document_id"]: row["prompt_tokens"] for row in rows}["long"]
        assert 600 < longest <= CONTEXT - 4
        assert all(row["truncated"] == (row["document_id"] == "long") for row in rows)


def test_a_server_that_does_not_sample_is_found_out(
    url: str,
    tiny_llama: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    documents = [Document(f"d{place}", f"The {place}th harbour.") for place in range(6)]
    method = MethodConfig(prompt="{text} Say it again.", generations=4, max_tokens=12)
    for extra_body in (SAMPLE, {}):
        root = tmp_path / f"root-{len(extra_body)}"
        config = GeneratorConfig(
            "openai",
            model=str(tiny_llama),
            urls=[url],
            context_length=CONTEXT,
            concurrency=2,
            extra_body=extra_body,
        )
        run_job(method, config, documents, tokenizer, root, serving)
        texts = GenerationStore(root / "generations" / "rephrase").read()["text"].to_pylist()
        assert (len(set(texts)) > len(documents)) == bool(extra_body)
        said = caplog.text.count("the server gives all siblings of a document the same text")
        assert said == (0 if extra_body else 1)
