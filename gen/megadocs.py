"""Documents and generations become megadocs: the four kinds of stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from gen.corpus import Document
from gen.latent import split_text

REAL, REPHRASE, THOUGHT = 0, 1, 2


@dataclass(frozen=True)
class Member:
    """A part of a megadoc: a real document or a piece of it, or a generation."""

    kind: int  # REAL, REPHRASE or THOUGHT
    text: str
    index: int  # which generation; for real text which piece


@dataclass(frozen=True)
class Megadoc:
    """One training document: members with a common source."""

    id: str
    document_id: str
    members: list[Member]


class Generations:
    """Generated texts by document, the first G of each.

    Args:
        table: rows of one method with ``document_id``, ``index`` and ``text``.
        documents: the documents in corpus order.
        count: G.
        where: what to name in errors: the store's folder.

    Raises:
        ValueError: some document has fewer than G generations; says how many and what to run.
    """

    def __init__(self, table: pa.Table, documents: list[Document], count: int, where: str) -> None:
        rank = {document.id: place for place, document in enumerate(documents)}
        names = table["document_id"].to_pylist()
        document = np.array([rank.get(name, -1) for name in names], dtype=np.int64)
        index = table["index"].to_numpy()
        chosen = np.flatnonzero((document >= 0) & (index < count))
        order = chosen[np.lexsort((index[chosen], document[chosen]))]
        found = np.bincount(document[order], minlength=len(documents))
        self.rows = order
        self.starts = np.concatenate(([0], found.cumsum()))
        self.indices = index
        self.texts = table["text"]
        self.found = found
        self.count = count
        self.where = where

    def require_all(self, documents: list[Document]) -> None:
        """Raise ValueError unless every document has G generations."""
        short = np.flatnonzero(self.found < self.count)
        if len(short):
            raise ValueError(
                f"{len(short)} of {len(documents)} documents have fewer than G={self.count} "
                f"generations in {self.where} (the first: {documents[short[0]].id!r} with "
                f"{self.found[short[0]]}); generate them with method.generations={self.count}, or "
                "build the streams with a smaller streams.generations"
            )

    def of(self, place: int) -> list[tuple[int, str]]:
        """Index and text of each generation of document ``place``, in order."""
        rows = self.rows[self.starts[place] : self.starts[place + 1]]
        return [(int(self.indices[row]), self.texts[int(row)].as_py()) for row in rows]


def real_documents(documents: list[Document]) -> Iterator[Megadoc]:
    """Every document alone."""
    for document in documents:
        yield Megadoc(document.id, document.id, [Member(REAL, document.text, 0)])


def simple(
    documents: list[Document], generations: Generations, with_real: bool, seed: int
) -> Iterator[Megadoc]:
    """Every rephrase, and one copy of every real document, as rows in one global shuffle."""
    generations.require_all(documents)
    rows = generations.count + with_real
    for row in np.random.default_rng(seed).permutation(len(documents) * rows).tolist():
        place, part = divmod(row, rows)
        document = documents[place]
        if part == generations.count:
            member = Member(REAL, document.text, 0)
            yield Megadoc(document.id, document.id, [member])
        else:
            index, text = generations.of(place)[part]
            yield Megadoc(f"{document.id}#{index}", document.id, [Member(REPHRASE, text, index)])


def stitched(
    documents: list[Document], generations: Generations, real_document: str
) -> Iterator[Megadoc]:
    """All rephrases of a document in a row, the real document last, first or absent."""
    generations.require_all(documents)
    for place, document in enumerate(documents):
        members = [Member(REPHRASE, text, index) for index, text in generations.of(place)]
        real = Member(REAL, document.text, 0)
        if real_document == "last":
            members.append(real)
        elif real_document == "first":
            members.insert(0, real)
        yield Megadoc(document.id, document.id, members)


def latent(
    documents: list[Document],
    generations: Generations,
    tokenizer: Tokenizer,
    open_thought: str,
    close_thought: str,
) -> Iterator[Megadoc]:
    """Every document in its order, stretched by a thought at each of its cuts."""
    for place, document in enumerate(documents):
        pieces = split_text(document.text, generations.count + 1, tokenizer)
        thoughts = dict(generations.of(place))
        missing = [cut for cut in range(len(pieces) - 1) if cut not in thoughts]
        if missing:
            raise ValueError(
                f"document {document.id!r} has no thought for {len(missing)} of its "
                f"{len(pieces) - 1} cuts in {generations.where}; run generate.py with "
                f"method=latent method.generations={generations.count}"
            )
        members = []
        for cut, piece in enumerate(pieces):
            members.append(Member(REAL, piece, cut))
            if cut < len(pieces) - 1:
                text = f"{open_thought}{thoughts[cut]}{close_thought}"
                members.append(Member(THOUGHT, text, cut))
        yield Megadoc(document.id, document.id, members)
