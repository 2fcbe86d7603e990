"""Documents and generations become megadocs: the four kinds of stream, as arrays of places."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gen.corpus.documents import Document
from gen.corpus.split import cut_places
from gen.generations.by_document import Generations
from trainer.data.format import REAL, REPHRASE, THOUGHT


@dataclass(frozen=True)
class Member:
    """A part of a megadoc: a real document or a piece of it, or a generation."""

    kind: int  # REAL, REPHRASE or THOUGHT
    text: str
    index: int  # which generation; for real text which piece
    style: int = 0  # which of the stream's methods it is of


@dataclass(frozen=True)
class Megadoc:
    """One training document: members with a common source."""

    id: str
    document_id: str
    members: list[Member]


@dataclass(frozen=True)
class Layout:
    """The megadocs of a stream in their stored order: M megadocs of N members in all.

    ``position`` is the place of the document for real text, and the place among the generations of
    its style otherwise. ``cuts`` are those of pieces of documents: from and to which token, from
    and to which character.
    """

    document: NDArray[np.int32]  # int32 [M]: place of its document
    row: NDArray[np.int32]  # int32 [M]: number behind the document's id; -1: there is none
    ends: NDArray[np.int32]  # int32 [M]: cumulative, in members
    kind: NDArray[np.uint8]  # uint8 [N]
    index: NDArray[np.int32]  # int32 [N]
    style: NDArray[np.uint8]  # uint8 [N]
    position: NDArray[np.int32]  # int32 [N]
    cuts: NDArray[np.int32] | None = None  # int32 [N, 4]

    def first_members(self) -> NDArray[np.bool_]:
        """Which members begin a megadoc: bool ``[N]``."""
        first = np.zeros(len(self.kind), dtype=bool)
        if len(self.ends):
            first[0] = True
            first[self.ends[:-1]] = True
        return first

    def last_members(self) -> NDArray[np.bool_]:
        """Which members end a megadoc: bool ``[N]``."""
        last = np.zeros(len(self.kind), dtype=bool)
        last[self.ends - 1] = True
        return last


@dataclass(frozen=True)
class Columns:
    """What stands in the columns of a grid of all texts of all documents."""

    kind: NDArray[np.uint8]  # uint8 [C]
    index: NDArray[np.int32]  # int32 [C]
    style: NDArray[np.uint8]  # uint8 [C]

    @classmethod
    def of(cls, styles: Sequence[Generations]) -> Columns:
        """The generations of each style, then the real document."""
        counts = [style.count for style in styles]
        rephrases = sum(counts)
        return cls(
            np.array([REPHRASE] * rephrases + [REAL], dtype=np.uint8),
            np.concatenate([*map(np.arange, counts), [0]]).astype(np.int32),
            np.append(np.repeat(np.arange(len(counts)), counts), 0).astype(np.uint8),
        )


def grid_of(documents: int, styles: Sequence[Generations]) -> NDArray[np.int32]:
    """Positions of the generations of each style, then of the document: int32 ``[D, C]``."""
    real = np.arange(documents, dtype=np.int32)[:, None]
    return np.concatenate([*(style.grid() for style in styles), real], axis=1)


def real_documents(documents: Sequence[Document]) -> Layout:
    """Every document alone."""
    count = len(documents)
    zeros = np.zeros(count, dtype=np.uint8)
    place = np.arange(count, dtype=np.int32)
    return Layout(
        place,
        np.full(count, -1, dtype=np.int32),
        np.arange(1, count + 1, dtype=np.int32),
        zeros,  # REAL
        zeros.astype(np.int32),
        zeros,
        place,
    )


def simple(
    documents: Sequence[Document], styles: Sequence[Generations], with_real: bool, seed: int
) -> Layout:
    """Every rephrase, and one copy of every real document, as rows in one global shuffle.

    A dropped rephrase leaves the order of the others as it is.
    """
    for generations in styles:
        generations.require_all(documents)
    grid = grid_of(len(documents), styles)
    columns = Columns.of(styles)
    real = grid.shape[1] - 1
    used = real + with_real
    # In place as far as it goes: these arrays are as long as all generations.
    order = np.random.default_rng(seed).permutation(len(documents) * used)
    place = (order // used).astype(np.int32)
    order %= used
    column = order.astype(np.int32)
    del order
    position = grid[place, column]
    del grid
    there = position >= 0
    if not there.all():
        place, column, position = place[there], column[there], position[there]
    return Layout(
        place,
        np.where(column == real, np.int32(-1), column),
        np.arange(1, len(place) + 1, dtype=np.int32),
        columns.kind[column],
        columns.index[column],
        columns.style[column],
        position,
    )


def stitched(
    documents: Sequence[Document],
    styles: Sequence[Generations],
    real_document: str,
    shuffle_seed: int | None = None,
) -> Layout:
    """All rephrases of a document in a row, the real document last, first or absent.

    Styles follow each other, or all rephrases are shuffled where there is a seed.
    """
    for generations in styles:
        generations.require_all(documents)
    grid = grid_of(len(documents), styles)
    columns = Columns.of(styles)
    rephrases = np.arange(grid.shape[1] - 1)
    real = rephrases[-1:] + 1
    order = {"last": [rephrases, real], "first": [real, rephrases], "absent": [rephrases]}
    column = np.concatenate(order[real_document])
    grid = grid[:, column]
    # Row by row: what is there of each document, in the columns' order.
    place, where = (half.astype(np.int32) for half in np.nonzero(grid >= 0))
    position, column = grid[place, where], column[where]
    members = np.bincount(place, minlength=len(documents))
    if shuffle_seed is not None:
        shuffle_rephrases(column, position, members, real[0], shuffle_seed)
    document = np.flatnonzero(members).astype(np.int32)  # of some, all may have been dropped
    return Layout(
        document,
        np.full(len(document), -1, dtype=np.int32),
        members[document].cumsum(dtype=np.int32),
        columns.kind[column],
        columns.index[column],
        columns.style[column],
        position,
    )


def shuffle_rephrases(
    column: NDArray[np.integer[Any]],
    position: NDArray[np.integer[Any]],
    members: NDArray[np.integer[Any]],
    real: int,
    seed: int,
) -> None:
    """Shuffle the rephrases of each document in place; the real document stays where it is."""
    shuffle = np.random.default_rng(seed).shuffle
    start = 0
    for count in members.tolist():
        own = np.flatnonzero(column[start : start + count] != real) + start
        order = list(range(len(own)))  # NumPy shuffles an array otherwise than a list
        shuffle(order)
        column[own], position[own] = column[own[order]], position[own[order]]
        start += count


def latent(
    documents: Sequence[Document],
    generations: Generations,
    starts_of: Callable[[int], list[int]],
) -> Layout:
    """Every document in its order, stretched by a thought at each cut that has one kept.

    Args:
        documents: in corpus order.
        generations: the thoughts.
        starts_of: the character at which each token of the document at a place starts.
    """
    members: list[tuple[int, int, int]] = []  # kind, index, position
    cuts: list[tuple[int, int, int, int]] = []
    ends = []
    for place, document in enumerate(documents):
        tokens, characters = cut_places(starts_of(place), len(document.text), generations.count + 1)
        pieces = len(tokens) - 1
        thoughts, made = generations.of_document(place), generations.made_indices(place)
        missing = [cut for cut in range(pieces - 1) if cut not in made]
        if missing and not generations.may_lack:
            raise ValueError(
                f"document {document.id!r} has no thought for {len(missing)} of its "
                f"{pieces - 1} cuts in {generations.where}; run generate.py with "
                f"method=latent method.generations={generations.count}"
            )
        for cut in range(pieces):
            members.append((REAL, cut, place))
            place_of = (tokens[cut], tokens[cut + 1], characters[cut], characters[cut + 1])
            cuts.append(place_of)
            if cut in thoughts and cut < pieces - 1:
                members.append((THOUGHT, cut, thoughts[cut]))
                cuts.append((0, 0, 0, 0))
        ends.append(len(members))
    kind, index, position = np.array(members, dtype=np.int32).reshape(-1, 3).T
    return Layout(
        np.arange(len(documents), dtype=np.int32),
        np.full(len(documents), -1, dtype=np.int32),
        np.array(ends, dtype=np.int32),
        kind.astype(np.uint8),
        index,
        np.zeros(len(kind), dtype=np.uint8),
        position,
        np.array(cuts, dtype=np.int32).reshape(-1, 4),
    )


def with_texts(
    layout: Layout,
    documents: Sequence[Document],
    styles: Sequence[Generations],
    open_thought: str = "",
    close_thought: str = "",
) -> Iterator[Megadoc]:
    """The megadocs of a layout with their texts, thoughts between their delimiters."""

    def text(member: int) -> str:
        position = int(layout.position[member])
        if layout.kind[member] == REAL:
            whole = documents[position].text
            return whole if layout.cuts is None else whole[slice(*layout.cuts[member, 2:])]
        found = styles[layout.style[member]].text(position)
        return f"{open_thought}{found}{close_thought}" if layout.kind[member] == THOUGHT else found

    start = 0
    for place, row, end in zip(
        layout.document.tolist(), layout.row.tolist(), layout.ends.tolist(), strict=True
    ):
        document = documents[place]
        members = [
            Member(
                int(layout.kind[member]),
                text(member),
                int(layout.index[member]),
                int(layout.style[member]),
            )
            for member in range(start, end)
        ]
        name = document.id if row < 0 else f"{document.id}#{row}"
        yield Megadoc(name, document.id, members)
        start = end
