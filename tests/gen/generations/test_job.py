"""Generation with the real embedded model: failures, raised G, cuts, full disks, adaptation."""

import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from gen.client.answers import GenerationFailed
from gen.client.concurrency import AdaptiveLimit
from gen.client.fitting import shorten
from gen.corpus.documents import Document, load_split
from gen.corpus.tokenizer import TokenizerConfig, train_bpe
from gen.generations import job as generation
from gen.generations.by_document import Generations
from gen.generations.failures import all_failures
from gen.generations.job import run_job
from gen.generations.siblings import COMPARED, REMEMBERED, Sameness
from gen.generations.status import status
from gen.generations.store import GenerationStore
from gen.prompts import MethodConfig
from gen.serving.servers import GeneratorConfig, Servers, serving
from tests.gen.generations.faults import faulty

REPHRASE = MethodConfig(prompt="Rewrite in other words: {text}", generations=3, max_tokens=8)
DOCUMENTS = [Document(f"d{i}", f"The {i}th cat sat on the mat and slept.") for i in range(4)]


def test_failed_documents_are_reported_and_tried_again(
    server: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:

    def run(urls: list[str]) -> None:
        config = GeneratorConfig("openai", urls=urls, concurrency=1, attempts=1)
        run_job(REPHRASE, config, DOCUMENTS, tokenizer, tmp_path, serving)

    with faulty(server, ["500"]) as url, pytest.raises(GenerationFailed, match=r"\(d0\)"):
        run([url])
    store = GenerationStore(tmp_path / "generations" / "rephrase")
    assert store.done(DOCUMENTS) == [{1, 2}, *[{0, 1, 2}] * 3]
    (failure,) = all_failures(store.folder).values()
    assert (failure.document_id, failure.index, failure.reason) == ("d0", 0, "HTTP 500")
    assert "1 failed (1 HTTP 500)" in status(tmp_path)
    run([server])
    assert store.done(DOCUMENTS) == [{0, 1, 2}] * 4
    texts = store.read()["text"].to_pylist()
    assert len(set(texts)) > len(DOCUMENTS)  # siblings differ
    config = GeneratorConfig("openai", urls=[server], model="another")
    with pytest.raises(ValueError, match="model: "):
        run_job(REPHRASE, config, DOCUMENTS, tokenizer, tmp_path, serving)


def test_siblings_that_are_all_the_same_are_found_out_once() -> None:
    sameness = Sameness()
    for document in range(COMPARED):  # the first of a document is compared with nothing
        assert not sameness.found(f"d{document}", f"text {document}")
    found = [sameness.found(f"d{document}", f"text {document}") for document in range(COMPARED)]
    assert found == [False] * (COMPARED - 1) + [True]
    assert not sameness.found("d0", "text 0")
    alone = Sameness()  # one generation a document: nothing to compare, and not all to be kept
    assert not any(alone.found(f"d{place}", "text") for place in range(REMEMBERED + 5))
    assert len(alone.first) == REMEMBERED
    for differs in range(COMPARED):
        sampled = Sameness()
        sampled.found("d0", "text")
        texts = ["another" if place == differs else "text" for place in range(2 * COMPARED)]
        assert not any(sampled.found("d0", text) for text in texts)


def test_raising_g_repeats_nothing(server: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = GeneratorConfig("openai", urls=[server])
    for count, new in ((1, 4), (3, 8), (3, 0)):
        method = MethodConfig(prompt=REPHRASE.prompt, generations=count, max_tokens=8)
        made = run_job(method, config, DOCUMENTS, tokenizer, tmp_path, serving)
        assert made.generations == new


def test_an_edited_document_is_written_about_again(
    server: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = GeneratorConfig("openai", urls=[server])
    run_job(REPHRASE, config, DOCUMENTS, tokenizer, tmp_path, serving)
    edited = [Document("d0", "Another text altogether."), *DOCUMENTS[1:]]
    store = GenerationStore(tmp_path / "generations" / "rephrase")
    with pytest.raises(ValueError, match="1 of 4 documents have fewer than G=3"):
        Generations.of_store(store, edited, 3).require_all(edited)
    made = run_job(REPHRASE, config, edited, tokenizer, tmp_path, serving)
    assert made.generations == 3
    for documents in (edited, DOCUMENTS):  # the old text's are still there
        Generations.of_store(store, documents, 3).require_all(documents)
    assert "12 generations of 4 documents" in status(tmp_path)


def test_thoughts_belong_to_the_cuts_of_one_tokenizer(
    server: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    method = MethodConfig(
        "latent", True, 1, prompt="Between {prefix} and {suffix} stands:", max_tokens=4
    )
    config = GeneratorConfig("openai", urls=[server])
    run_job(method, config, DOCUMENTS[:1], tokenizer, tmp_path, serving)
    other = train_bpe([document.text for document in DOCUMENTS], TokenizerConfig(vocab_size=270))
    with pytest.raises(ValueError, match=r"latent-g1 was written with .*\(vocabulary: '"):
        run_job(method, config, DOCUMENTS[:1], other, tmp_path, serving)


def test_long_documents_are_cut_to_fit_and_marked(
    server: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    documents = [Document("long", "word " * 600), Document("short", "a few words")]
    config = GeneratorConfig("openai", urls=[server], context_length=256)
    latent = MethodConfig(
        "latent", True, 2, prompt="Before: {prefix} After: {suffix}", max_tokens=8
    )
    for method in (REPHRASE, latent):
        run_job(method, config, documents, tokenizer, tmp_path, serving)
        store = GenerationStore.of_method(tmp_path, method.name, method.generations, method.latent)
        for row in store.read().to_pylist():
            assert row["truncated"] == (row["document_id"] == "long")
            assert row["prompt_tokens"] <= 256 - 8
            if row["truncated"]:
                assert row["prompt_tokens"] > 160  # no more is cut than must be
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


def test_a_full_disk_ends_the_job_and_the_next_one_goes_on(
    server: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GeneratorConfig("openai", urls=[server], concurrency=2, flush_seconds=0.2)
    full = threading.Event()
    write = pq.ParquetWriter.write_table

    def write_until_full(writer: pq.ParquetWriter, table: pa.Table) -> None:
        """The third part meets a full disk: a real one, half of the part is written."""
        path = Path(writer.where)
        if len(GenerationStore(path.parent).parts()) >= 2 and not full.is_set():
            full.set()
            path.write_bytes(b"PAR1 half a part")
            with open("/dev/full", "wb", buffering=0) as disk:
                disk.write(b"the other half")
        write(writer, table)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", write_until_full)
    with pytest.raises(OSError, match=r"could not write a part .*No space left"):
        run_job(REPHRASE, config, DOCUMENTS, tokenizer, tmp_path, serving)
    assert full.is_set()
    run_job(REPHRASE, config, DOCUMENTS, tokenizer, tmp_path, serving)
    rows = GenerationStore(tmp_path / "generations" / "rephrase").read().to_pylist()
    assert Counter((row["document_id"], row["index"]) for row in rows) == Counter(
        (document.id, index) for document in DOCUMENTS for index in range(3)
    )


def test_another_prompt_is_refused_before_anything_is_asked(
    server: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = GeneratorConfig("openai", urls=[server])
    run_job(REPHRASE, config, DOCUMENTS[:1], tokenizer, tmp_path, serving)
    other = MethodConfig(prompt="Say it in other words: {text}", generations=3, max_tokens=8)
    with pytest.raises(ValueError, match=r"prompt: 'Rewrite in other.*' -> 'Say it in other"):
        run_job(other, config, DOCUMENTS, tokenizer, tmp_path, serving)


def test_extra_fields_reach_the_server_and_belong_to_the_store(
    server: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    method = MethodConfig(prompt=REPHRASE.prompt, generations=3, max_tokens=4)
    config = GeneratorConfig("openai", urls=[server], concurrency=1, extra_body={"top_k": 1})
    run_job(method, config, DOCUMENTS[:2], tokenizer, tmp_path, serving)
    rows = GenerationStore(tmp_path / "generations" / "rephrase").read().to_pylist()
    texts = {(row["document_id"], row["text"]) for row in rows}
    assert len(texts) == 2  # whatever their seeds, the likeliest tokens
    for other in (replace(config, extra_body={}), replace(config, extra_headers={"X-Team": "a"})):
        with pytest.raises(ValueError, match=r"written with other settings \(extra_"):
            run_job(method, other, DOCUMENTS[:2], tokenizer, tmp_path, serving)


def test_a_second_job_on_the_same_store_is_refused(
    server: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = GeneratorConfig("openai", urls=[server])

    @contextlib.contextmanager
    def while_another_runs(config: GeneratorConfig, log: Path) -> Iterator[Servers]:
        with pytest.raises(ValueError, match="another job is writing"):
            run_job(REPHRASE, config, DOCUMENTS, tokenizer, tmp_path, serving)
        with serving(config, log) as servers:
            yield servers

    session = run_job(REPHRASE, config, DOCUMENTS, tokenizer, tmp_path, while_another_runs)
    assert session.generations == 3 * len(DOCUMENTS)


@pytest.mark.slow
def test_adaptive_concurrency_fills_a_real_server(
    server: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four slots and a band of 1 to 3 waiting requests: between 5 and 7 in flight."""
    monkeypatch.setattr(generation, "LOOK_EVERY", 0.05)
    limits: list[tuple[int, float]] = []

    class Recorded(AdaptiveLimit):
        def observe_queue(self, waiting: float, in_flight: int) -> int:
            limits.append((self.limit, waiting))
            return super().observe_queue(waiting, in_flight)

    monkeypatch.setattr(
        generation, "AdaptiveLimit", functools.partial(Recorded, queue_low=1, queue_high=3)
    )
    config = GeneratorConfig("openai", urls=[server], concurrency=64, adaptive=True)
    documents = [Document(f"e{i}", f"The {i}th cat sat on the mat.") for i in range(24)]
    method = MethodConfig(prompt="Rewrite: {text}", generations=2, max_tokens=12)
    run_job(method, config, documents, tokenizer, tmp_path, serving)
    settled = [limit for limit, _ in limits[len(limits) // 2 :]]
    assert limits[0][0] == 1
    assert max(limit for limit, _ in limits) < 40  # far from the 64 that are allowed
    assert 4 <= sum(settled) / len(settled) <= 20  # llama.cpp tells its queue between two steps


@pytest.mark.slow
def test_the_cuts_of_a_document_share_the_text_before_them(
    tokenizer: Tokenizer, tmp_path: Path, server: str
) -> None:
    """From the last cut to the first: half of an evenly cut document is cached on average."""
    text = " ".join(f"Sentence {i} tells of the {i * i}th ship." for i in range(20))
    method = MethodConfig(
        "latent", True, 5, prompt="Before: {prefix}\n\nAfter: {suffix}\n\nBetween:", max_tokens=2
    )
    config = GeneratorConfig("openai", urls=[server], context_length=512, concurrency=1)
    run_job(method, config, [Document("s", text)], tokenizer, tmp_path, serving)
    rows = GenerationStore.of_method(tmp_path, "latent", 5, True).read().to_pylist()
    shares = {row["index"]: row["cached_tokens"] / row["prompt_tokens"] for row in rows}
    assert set(shares) == set(range(5))
    for index in range(4):  # all but the first request, which is the last cut's
        assert shares[index] > 0.9 * (index + 1) / 6
