"""Generation with the real embedded model: faults on real sockets, SIGKILL at random moments."""

import json
from collections import Counter
from pathlib import Path

import pytest

from gen.client import GenerationFailed
from gen.corpus import Document, load_split
from gen.fitting import shorten
from gen.generation import run_job
from gen.prompts import MethodConfig
from gen.servers import GeneratorConfig, serving
from gen.store import GenerationStore
from gen.tokenizer import load_tokenizer
from tests.gen.faults import faulty

REPHRASE = MethodConfig(prompt="Rewrite in other words: {text}", generations=3, max_tokens=8)
DOCUMENTS = [Document(f"d{i}", f"The {i}th cat sat on the mat and slept.") for i in range(4)]


def test_failed_documents_are_reported_and_tried_again(
    server: str, corpus_root: Path, tmp_path: Path
) -> None:
    tokenizer, _ = load_tokenizer(corpus_root)

    def run(urls: list[str]) -> None:
        config = GeneratorConfig("openai", urls=urls, concurrency=1, attempts=1)
        run_job(REPHRASE, config, DOCUMENTS, tokenizer, tmp_path, serving)

    with faulty(server, ["500"]) as url, pytest.raises(GenerationFailed, match=r"\(d0\)"):
        run([url])
    store = GenerationStore(tmp_path / "generations" / "rephrase")
    assert store.done() == {"d0": {1, 2}} | {f"d{i}": {0, 1, 2} for i in (1, 2, 3)}
    failures = json.loads((store.folder / "failures-000.json").read_text())
    assert list(failures) == ["d0#0"]
    run([server])
    assert store.done() == {f"d{i}": {0, 1, 2} for i in range(4)}
    texts = store.read()["text"].to_pylist()
    assert len(set(texts)) > len(DOCUMENTS)  # siblings differ
    config = GeneratorConfig("openai", urls=[server], model="another")
    with pytest.raises(ValueError, match="model: "):
        run_job(REPHRASE, config, DOCUMENTS, tokenizer, tmp_path, serving)


def test_raising_g_repeats_nothing(server: str, corpus_root: Path, tmp_path: Path) -> None:
    tokenizer, _ = load_tokenizer(corpus_root)
    config = GeneratorConfig("openai", urls=[server])
    for count, new in ((1, 4), (3, 8), (3, 0)):
        method = MethodConfig(prompt=REPHRASE.prompt, generations=count, max_tokens=8)
        made = run_job(method, config, DOCUMENTS, tokenizer, tmp_path, serving)
        assert made.generations == new


def test_long_documents_are_cut_to_fit_and_marked(
    server: str, corpus_root: Path, tmp_path: Path
) -> None:
    tokenizer, _ = load_tokenizer(corpus_root)
    documents = [Document("long", "word " * 3000), Document("short", "a few words")]
    config = GeneratorConfig("openai", urls=[server], context_length=512)
    latent = MethodConfig(
        "latent", True, 2, prompt="Before: {prefix} After: {suffix}", max_tokens=8
    )
    for method in (REPHRASE, latent):
        run_job(method, config, documents, tokenizer, tmp_path, serving)
        store = GenerationStore.of_method(tmp_path, method.name, method.generations, method.latent)
        for row in store.read().to_pylist():
            assert row["truncated"] == (row["document_id"] == "long")
            assert row["prompt_tokens"] <= 512 - 8
            if row["truncated"]:
                assert row["prompt_tokens"] > 350  # no more is cut than must be
    config = GeneratorConfig("openai", urls=[server], context_length=75)
    with pytest.raises(GenerationFailed, match="not even the instructions fit"):
        run_job(REPHRASE, config, documents[:1], tokenizer, tmp_path / "b", serving)


def test_shortening_keeps_the_text_around_a_cut() -> None:
    assert shorten({"text": "abcdefgh"}, 0.5) == {"text": "abcd"}
    assert shorten({"prefix": "abcd", "suffix": "efgh"}, 0.5) == {"prefix": "cd", "suffix": "ef"}


def test_the_embedded_job_shares_prompt_prefixes(corpus_root: Path) -> None:
    rows = GenerationStore(corpus_root / "generations" / "rephrase").read().to_pylist()
    documents = [document.id for document in load_split(corpus_root, "train")]
    assert Counter((row["document_id"], row["index"]) for row in rows) == Counter(
        (name, index) for name in documents for index in range(2)
    )
    second = [row for row in rows if row["index"] == 1]
    cached = sum(row["cached_tokens"] for row in second)
    assert cached > 0.5 * sum(row["prompt_tokens"] for row in second)
