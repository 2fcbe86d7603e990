"""What missing generations will cost: prompts, shared beginnings, answers, hours."""

from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from gen.corpus.documents import Document
from gen.corpus.tokenizer import encode
from gen.estimate import GenerateEstimate, estimate
from gen.generations.store import Generation, GenerationStore
from gen.prompts import MethodConfig
from gen.serving.servers import GeneratorConfig

METHOD = MethodConfig(prompt="Rewrite: {text}", generations=3, max_tokens=10)
DOCUMENTS = [Document(f"d{i}", "the cat sat on the mat " * (i + 1)) for i in range(4)]
SPEED = GenerateEstimate(True, tokens_per_second=100.0)


def count(tokenizer: Tokenizer, text: str) -> int:
    return len(encode(tokenizer, [text])[0])


def test_prompts_answers_and_hours(tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = estimate(METHOD, GeneratorConfig(), SPEED, DOCUMENTS, tokenizer, tmp_path)
    prompts = sum(count(tokenizer, f"Rewrite: {document.text}") for document in DOCUMENTS)
    assert (found.documents, found.generations) == (4, 12)
    assert found.prompt_tokens == 3 * prompts
    assert found.cached_tokens == 2 * prompts  # all but the first of each document
    lengths = [min(10, count(tokenizer, document.text)) for document in DOCUMENTS]
    assert found.new_tokens == 3 * sum(lengths)
    assert found.gpu_hours == found.new_tokens / 100 / 3600
    assert "assumed: as long as the document" in str(found)
    assert "67% of them expected in the cache" in str(found)
    assert not (tmp_path / "generations").exists()


def test_what_is_there_says_how_long_answers_are(tokenizer: Tokenizer, tmp_path: Path) -> None:
    store = GenerationStore(tmp_path / "generations" / "rephrase")
    store.folder.mkdir(parents=True)
    rows = [
        Generation(
            "d0", "rephrase", index, "text", "m", "v", 1.0, 1.0, 9, 0, "stop", 1, tokens, 0, False,
            text_hash=DOCUMENTS[0].text_hash,
        )
        for index, tokens in enumerate((30, 50))
    ]  # fmt: skip
    store.append(rows, 0)
    found = estimate(METHOD, GeneratorConfig(), SPEED, DOCUMENTS, tokenizer, tmp_path)
    assert found.generations == 10
    assert found.new_tokens == 10 * 40
    assert "as the 2 that are there: 40 tokens each" in str(found)


def test_thoughts_share_what_stands_before_their_cuts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    latent = replace(METHOD, latent=True, prompt="{prefix} [thought] {suffix}", generations=2)
    long = [Document("long", "the cat sat on the mat " * 30)]
    found = estimate(latent, GeneratorConfig(), SPEED, long, tokenizer, tmp_path)
    assert found.generations == 2
    share = found.cached_tokens / found.prompt_tokens
    assert 0.1 < share < 0.25  # the first third of the second prompt


def test_a_speed_that_is_none_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"estimate\.tokens_per_second=0 must be above 0"):
        estimate(
            METHOD, GeneratorConfig(), GenerateEstimate(True, 0), DOCUMENTS, tokenizer, tmp_path
        )
