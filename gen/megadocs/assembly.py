"""Documents and generations become megadocs: the four kinds of stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from gen.corpus.documents import Document
from gen.generations.store import places_of
from gen.megadocs.split import split_document
from trainer.data.format import REAL, REPHRASE, THOUGHT

# Of a store, what megadocs are made of.
TEXT_COLUMNS = ["document_id", "text_hash", "index", "text"]


@dataclass(frozen=True)
class Member:
    """A part of a megadoc: a real document or a piece of it, or a generation."""

    kind: int  # REAL, REPHRASE or THOUGHT
    text: str
    index: int  # which generation; for real text which piece
    style: int = 0  # which of the stream's methods it is of
    tokens: list[int] | None = None  # ids, where they are known already


@dataclass(frozen=True)
class Megadoc:
    """One training document: members with a common source."""

    id: str
    document_id: str
    members: list[Member]


class Generations:
    """Generated texts by document, the first G of each, made from the text that it has now.

    Args:
        table: rows of one method with :data:`TEXT_COLUMNS`.
        documents: the documents in corpus order.
        count: G.
        where: what to name in errors: the store's folder.
        may_lack: whether documents may have fewer than G.

    Raises:
        ValueError: a generation is there twice.
    """

    def __init__(
        self,
        table: pa.Table,
        documents: list[Document],
        count: int,
        where: str,
        may_lack: bool = False,
    ) -> None:
        document = places_of(table, documents)
        index = table["index"].to_numpy()
        chosen = np.flatnonzero((document >= 0) & (index < count))
        order = chosen[np.lexsort((index[chosen], document[chosen]))]
        same = (np.diff(document[order]) == 0) & (np.diff(index[order]) == 0)
        if same.any():
            twice = order[np.flatnonzero(same)[0]]
            raise ValueError(
                f"{where} holds generation {index[twice]} of {documents[document[twice]].id!r} "
                f"twice ({same.sum()} such pairs in all): were parts of another store copied into "
                "it? Delete those"
            )
        found = np.bincount(document[order], minlength=len(documents))
        self.rows = order
        self.starts = np.concatenate(([0], found.cumsum()))
        self.indices = index
        self.texts = table["text"]
        self.found = found
        self.count = count
        self.where = where
        self.may_lack = may_lack
        self.kept = np.ones(len(order), dtype=bool)
        self.edit: Callable[[str], str] | None = None

    def take(self, documents: np.ndarray) -> None:
        """Use generations of those documents alone: bool ``[documents]``."""
        self.kept = self.kept & np.repeat(documents, self.found)

    def select(self, kept: np.ndarray, edit: Callable[[str], str] | None) -> None:
        """Leave out what the quality gates drop and edit the rest.

        Args:
            kept: bool for each of the generations, by document in corpus order, then by index.
            edit: applied to every text that is used.
        """
        if len(kept) != len(self.rows):
            raise ValueError(
                f"{len(kept)} generations were judged but {self.where} has {len(self.rows)}; "
                "something changed it meanwhile: run the same command again"
            )
        self.kept, self.edit = kept, edit

    def require_all(self, documents: list[Document]) -> None:
        """Raise ValueError unless every document has G generations, or may lack some."""
        short = np.flatnonzero(self.found < self.count)
        if len(short) and not self.may_lack:
            raise ValueError(
                f"{len(short)} of {len(documents)} documents have fewer than G={self.count} "
                f"generations in {self.where} (the first: {documents[short[0]].id!r} with "
                f"{self.found[short[0]]}); generate them with method.generations={self.count}, or "
                "build the streams with a smaller streams.generations"
            )

    def of(self, place: int) -> dict[int, str]:
        """Text by index of the generations of document ``place`` that are kept, in order."""
        here = slice(self.starts[place], self.starts[place + 1])
        rows = self.rows[here][self.kept[here]]
        texts = {int(self.indices[row]): self.texts[int(row)].as_py() for row in rows}
        return {index: self.edit(text) for index, text in texts.items()} if self.edit else texts

    def one(self, place: int, index: int) -> str | None:
        """One generation of a document, or None where it is dropped or lacking."""
        rows = self.rows[self.starts[place] : self.starts[place + 1]]
        position = self.starts[place] + np.searchsorted(self.indices[rows], index)
        if position == self.starts[place + 1] or self.indices[self.rows[position]] != index:
            return None
        if not self.kept[position]:
            return None
        text = self.texts[int(self.rows[position])].as_py()
        return self.edit(text) if self.edit else text

    def made(self, place: int) -> set[int]:
        """Indices of all generations of document ``place``, the dropped ones included."""
        rows = self.rows[self.starts[place] : self.starts[place + 1]]
        return set(self.indices[rows].tolist())


def real_documents(documents: list[Document]) -> Iterator[Megadoc]:
    """Every document alone."""
    for document in documents:
        yield Megadoc(document.id, document.id, [Member(REAL, document.text, 0)])


def simple(
    documents: list[Document], styles: list[Generations], with_real: bool, seed: int
) -> Iterator[Megadoc]:
    """Every rephrase, and one copy of every real document, as rows in one global shuffle.

    A dropped rephrase leaves the order of the others as it is.
    """
    for generations in styles:
        generations.require_all(documents)
    parts = [(style, index) for style, one in enumerate(styles) for index in range(one.count)]
    rows = len(parts) + with_real
    for row in np.random.default_rng(seed).permutation(len(documents) * rows).tolist():
        place, part = divmod(row, rows)
        document = documents[place]
        if part == len(parts):
            member = Member(REAL, document.text, 0)
            yield Megadoc(document.id, document.id, [member])
            continue
        style, index = parts[part]
        if (text := styles[style].one(place, index)) is not None:
            member = Member(REPHRASE, text, index, style)
            yield Megadoc(f"{document.id}#{part}", document.id, [member])


def stitched(
    documents: list[Document],
    styles: list[Generations],
    real_document: str,
    shuffle_seed: int | None = None,
) -> Iterator[Megadoc]:
    """All rephrases of a document in a row, the real document last, first or absent.

    Styles follow each other, or all rephrases are shuffled where there is a seed.
    """
    for generations in styles:
        generations.require_all(documents)
    shuffle = None if shuffle_seed is None else np.random.default_rng(shuffle_seed).shuffle
    for place, document in enumerate(documents):
        members = [
            Member(REPHRASE, text, index, style)
            for style, generations in enumerate(styles)
            for index, text in generations.of(place).items()
        ]
        if shuffle is not None:
            shuffle(members)  # type: ignore[arg-type]
        real = Member(REAL, document.text, 0)
        if real_document == "last":
            members.append(real)
        elif real_document == "first":
            members.insert(0, real)
        if members:  # without the real document, all may have been dropped
            yield Megadoc(document.id, document.id, members)


def latent(
    documents: list[Document],
    generations: Generations,
    tokenizer: Tokenizer,
    open_thought: str,
    close_thought: str,
) -> Iterator[Megadoc]:
    """Every document in its order, stretched by a thought at each cut that has one kept."""
    for place, document in enumerate(documents):
        pieces = split_document(document.text, generations.count + 1, tokenizer)
        thoughts, made = generations.of(place), generations.made(place)
        missing = [cut for cut in range(len(pieces) - 1) if cut not in made]
        if missing and not generations.may_lack:
            raise ValueError(
                f"document {document.id!r} has no thought for {len(missing)} of its "
                f"{len(pieces) - 1} cuts in {generations.where}; run generate.py with "
                f"method=latent method.generations={generations.count}"
            )
        members = []
        for cut, piece in enumerate(pieces):
            members.append(Member(REAL, piece.text, cut, tokens=piece.tokens))
            if cut in thoughts and cut < len(pieces) - 1:
                text = f"{open_thought}{thoughts[cut]}{close_thought}"
                members.append(Member(THOUGHT, text, cut))
        yield Megadoc(document.id, document.id, members)
