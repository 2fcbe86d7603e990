"""What the missing generations will cost, before a GPU is rented: ``generate.py estimate=true``.

Prompts are built as the job builds them and counted on a sample of the documents. How long answers
are is taken from generations of this method that exist; without any, they are taken to be as long
as their document, at most ``method.max_tokens``, which is said.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.compute as pc
from tabulate import tabulate
from tokenizers import Tokenizer

from gen.client.fitting import counting_tokenizer
from gen.corpus.documents import Document
from gen.corpus.tokenizer import encode
from gen.generations.job import missing_works
from gen.generations.siblings import Work
from gen.generations.store import GenerationStore
from gen.prompts import MethodConfig
from gen.serving.servers import GeneratorConfig
from trainer.config.fields import check_bounds, setting

SAMPLE = 200  # documents whose prompts are counted


@dataclass
class GenerateEstimate:
    """``generate.py estimate=true``."""

    enabled: bool = setting(
        False, "Say what the missing generations will cost instead of making them."
    )
    tokens_per_second: float = setting(
        2000.0,
        "New tokens that one GPU generates, prompts included in its time. There is no figure for "
        "every model: python -m benchmarks.generation measures it on one GPU.",
        unit="tokens/s",
        above=0,
    )


@dataclass(frozen=True)
class Cost:
    """Of the generations of one method that are missing."""

    documents: int
    generations: int
    prompt_tokens: int
    cached_tokens: int  # of these, if siblings find their common beginning in the server's cache
    new_tokens: int
    lengths: str  # where the lengths of the answers come from
    tokenizer: str
    tokens_per_second: float

    @property
    def gpu_hours(self) -> float:
        return self.new_tokens / self.tokens_per_second / 3600

    def __str__(self) -> str:
        share = self.cached_tokens / max(1, self.prompt_tokens)
        lines = {
            "missing": f"{self.generations:,} generations of {self.documents:,} documents",
            "prompts": f"{self.prompt_tokens:,} tokens ({self.tokenizer}), {share:.0%} of them "
            "expected in the cache",
            "answers": f"{self.new_tokens:,} tokens ({self.lengths})",
            "time": f"{self.gpu_hours:,.2f} GPU-hours at {self.tokens_per_second:,.0f} new tokens "
            "a second and GPU (estimate.tokens_per_second)",
        }
        return tabulate(lines.items(), tablefmt="plain")


def estimate(
    method: MethodConfig,
    config: GeneratorConfig,
    settings: GenerateEstimate,
    documents: list[Document],
    tokenizer: Tokenizer,
    root: Path,
) -> Cost:
    """The cost of what ``root`` lacks; of all writers together."""
    check_bounds(settings, "estimate.")
    store = GenerationStore.of_method(root, method.name, method.generations, method.latent)
    alone = replace(config, writer=0, writers=1)
    works, _ = missing_works(method, alone, store, documents, tokenizer)
    counted, name = tokenizer, "the corpus's tokenizer"
    if config.tokenizer:
        counted, name = counting_tokenizer(config.tokenizer), config.tokenizer
    sample = works[:: max(1, len(works) // SAMPLE)]
    generations = sum(len(work.indices) for work in works)
    drawn = sum(len(work.indices) for work in sample)
    scale = generations / max(1, drawn)
    prompts = cached = answers = 0
    for work in sample:
        own, shared = prompt_tokens(method, work, counted)
        prompts, cached = prompts + own, cached + shared
        document = len(encode(counted, [work.document.text])[0])
        answers += len(work.indices) * min(document, method.max_tokens)
    lengths = "assumed: as long as the document, at most method.max_tokens"
    new_tokens = answers * scale
    if store.parts():
        made = store.read(["completion_tokens"])["completion_tokens"]
        if (mean := pc.mean(made).as_py()) is not None:
            lengths = f"as the {len(made):,} that are there: {mean:,.0f} tokens each"
            new_tokens = mean * generations
    return Cost(
        len(works),
        generations,
        round(prompts * scale),
        round(cached * scale),
        round(new_tokens),
        lengths,
        name,
        settings.tokens_per_second,
    )


def prompt_tokens(method: MethodConfig, work: Work, tokenizer: Tokenizer) -> tuple[int, int]:
    """Tokens of a document's prompts, and those that begin as an earlier one of them did."""
    texts = [
        "".join(part["content"] for part in method.messages(index, **work.fields(index)))
        for index in work.indices
    ]
    prompts = encode(tokenizer, texts)
    cached = 0
    for place, ids in enumerate(prompts):
        cached += max((common(ids, earlier) for earlier in prompts[:place]), default=0)
    return sum(map(len, prompts)), cached


def common(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    for place, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return place
    return min(len(a), len(b))
