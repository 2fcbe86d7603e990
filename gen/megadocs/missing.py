"""Generations that a stream should have and that are not there: how many, why, and whether it may.

A document that no server will ever answer must not keep a corpus from being used, and a job that
stopped half way must not pass for a finished one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenizers import Tokenizer

from gen.corpus.documents import Document
from gen.corpus.split import split_text
from gen.generations.by_document import Generations
from gen.generations.failures import all_failures, describe_reasons, reasons_of
from gen.generations.store import GenerationStore


@dataclass(frozen=True)
class Missing:
    """Of one stream and one store."""

    where: str  # the store's folder
    count: int  # G, or its mean
    generations: int  # missing
    wanted: int  # in all
    documents: int = 0  # that lack some
    reasons: dict[str, int] = field(default_factory=dict)
    example: str = ""  # one of them

    @property
    def share(self) -> float:
        return self.generations / max(1, self.wanted)

    def describe(self) -> str:
        return (
            f"{self.generations:,} of {self.wanted:,} generations are missing "
            f"({describe_reasons(self.reasons)})"
        )

    def check(self, policy: str, allowed_share: float) -> None:
        """Raise ValueError where a stream must not lack that many.

        Args:
            policy: ``refuse`` or ``allow``.
            allowed_share: of all its generations, with ``allow``.
        """
        if not self.generations or (policy == "allow" and self.share <= allowed_share):
            return
        way_out = (
            f"that is {self.share:.2%}, more than streams.missing_share={allowed_share:.2%}"
            if policy == "allow"
            else f"generate them with method.generations={self.count}, build with a smaller "
            "streams.generations, or without them: streams.missing=allow"
        )
        raise ValueError(
            f"{self.documents:,} documents have fewer than G={self.count} generations in "
            f"{self.where}: {self.describe()}, the first of {self.example!r}; {way_out}"
        )


def missing_of(
    generations: Generations,
    documents: list[Document],
    store: GenerationStore,
    tokenizer: Tokenizer | None,
) -> Missing:
    """What a store lacks of the first G generations of some documents.

    Args:
        generations: what is there.
        documents: in corpus order.
        store: whose failures tell the reasons.
        tokenizer: where generations are thoughts: short documents have fewer cuts than G.
    """
    wanted, missing = 0, []
    for place, (document, count) in enumerate(
        zip(documents, generations.counts.tolist(), strict=True)
    ):
        if generations.found[place] < count and tokenizer is not None:
            count = len(split_text(document.text, count + 1, tokenizer)) - 1
        wanted += count
        if generations.found[place] < count:
            made = generations.made_indices(place)
            missing += [(document.id, index) for index in range(count) if index not in made]
    if not missing:
        return Missing(generations.where, generations.mean, 0, wanted)
    reasons = reasons_of(missing, all_failures(store.folder))
    lacking = {document_id for document_id, _ in missing}
    return Missing(
        generations.where,
        generations.mean,
        len(missing),
        wanted,
        len(lacking),
        reasons,
        missing[0][0],
    )
