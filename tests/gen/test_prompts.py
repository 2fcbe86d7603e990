"""Styles: every YAML in conf/generate/method works, and siblings of a document differ."""

import asyncio
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tokenizers import Tokenizer

from gen.client.chat import ChatClient
from gen.client.routing import Routing
from gen.corpus.documents import Document
from gen.generations.job import run_job
from gen.generations.store import GenerationStore
from gen.pipeline import GenerateConfig
from gen.prompts import MethodConfig, sibling_seed
from gen.serving.servers import GeneratorConfig, serving
from tests.conftest import REPOSITORY

STYLES = sorted(path.stem for path in (REPOSITORY / "conf" / "generate" / "method").glob("*.yaml"))
DOCUMENT = Document("d0", "The ferry to the island leaves at noon and takes forty minutes. " * 3)


def method_of(style: str, *overrides: str) -> MethodConfig:
    """A style as the entry point reads it."""
    import generate  # noqa: F401  registers the schema

    with initialize_config_dir(str(REPOSITORY / "conf" / "generate"), version_base="1.3"):
        config = OmegaConf.to_object(compose("config", [f"method={style}", *overrides]))
    assert isinstance(config, GenerateConfig)
    return config.method


@pytest.mark.parametrize("style", STYLES)
def test_every_style_names_itself_and_its_source(style: str) -> None:
    method = method_of(style)
    method.check()
    assert method.name == style
    assert "arXiv" in method.source
    wording = [method.messages(index, text="T", prefix="P", suffix="S") for index in range(8)]
    assert all("{" not in message["content"] for chat in wording for message in chat)
    assert len({str(chat) for chat in wording}) == max(1, len(method.variants))


def test_versions_change_with_the_wording_and_the_variants() -> None:
    methods = [
        MethodConfig(prompt="{text}"),
        MethodConfig(prompt="{text}", system="s"),
        MethodConfig(prompt="{text} {variant}", variants=["a", "b"]),
        MethodConfig(prompt="{text} {variant}", variants=["b", "a"]),
    ]
    assert len({method.version for method in methods}) == 4
    assert methods[0].version == MethodConfig(name="other", prompt="{text}").version
    with pytest.raises(ValueError, match=r"it must have \['text', 'variant'\]"):
        MethodConfig(prompt="{text}", variants=["a"]).check()
    with pytest.raises(ValueError, match="has the fields"):
        MethodConfig(prompt="{text} {variant}").check()


def test_variants_are_taken_in_turn_and_come_after_the_document() -> None:
    maga = method_of("maga", "method.generations=16")
    chats = [maga.messages(index, text="TEXT")[-1]["content"] for index in range(16)]
    assert chats[:8] == chats[8:]
    shared = chats[0][: chats[0].index("as a chapter")]
    assert "TEXT" in shared
    assert all(chat.startswith(shared) for chat in chats)


@pytest.mark.parametrize("style", ["maga", "faq", "self"])
def test_siblings_of_a_document_differ(
    server: str, tokenizer: Tokenizer, tmp_path: Path, style: str
) -> None:
    method = method_of(style, "method.generations=6", "method.max_tokens=12")
    config = GeneratorConfig("openai", urls=[server], concurrency=2, context_length=512)
    run_job(method, config, [DOCUMENT], tokenizer, tmp_path, serving)
    rows = GenerationStore.of_method(tmp_path, style, 6).read().to_pylist()
    assert len({row["seed"] for row in rows}) == 6
    assert len({row["text"] for row in rows}) == 6


def test_the_same_seed_gives_the_same_text_alone_on_the_server(server: str) -> None:
    """llama.cpp repeats itself for one request at a time; batches may differ in the last bits."""

    async def texts() -> list[str]:
        async with ChatClient(Routing([server], 60.0), "m", 1, 60.0, 2) as client:
            answers = []
            for seed in (sibling_seed(0, "d", "m", index) for index in (0, 0, 1)):
                messages = [{"role": "user", "content": "Name a colour and an animal."}]
                answer = await client.chat(
                    "d", messages, max_tokens=12, temperature=1.0, top_p=1.0, seed=seed
                )
                answers.append(answer.text)
        return answers

    first, again, other = asyncio.run(texts())
    assert first == again
    assert first != other
