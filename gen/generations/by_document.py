"""Which generations of a store belong to which document, and which of them are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gen.corpus.documents import Document
from gen.generations.store import DocumentPlaces, GenerationStore, read_part

# Of a store, what says whose a generation is.
KEY_COLUMNS = ["document_id", "text_hash", "index"]


class Generations:
    """Which generations there are of each document: the first G, made from the text it has now.

    Args:
        place: of the document of each row of a store, -1 for none: int ``[rows]``.
        index: of each row: int ``[rows]``.
        documents: the documents in corpus order.
        counts: G, the same for all or of each document: int ``[documents]``.
        where: what to name in errors: the store's folder.
        may_lack: whether documents may have fewer than G.

    Raises:
        ValueError: a generation is there twice.
    """

    def __init__(
        self,
        place: NDArray[np.integer[Any]],
        index: NDArray[np.integer[Any]],
        documents: Sequence[Document],
        counts: int | NDArray[np.integer[Any]],
        where: str,
        may_lack: bool = False,
    ) -> None:
        self.counts = np.broadcast_to(counts, len(documents))
        wanted = counts if isinstance(counts, int) else counts[place]
        chosen = np.flatnonzero((place >= 0) & (index < wanted))
        order = chosen[np.lexsort((index[chosen], place[chosen]))]
        self.rows = order.astype(np.int32 if len(place) < 1 << 31 else np.int64)
        self.places = place[order].astype(np.int32)  # of the document of each, ascending
        self.indices = index[order].astype(np.int32)
        same = (np.diff(self.places) == 0) & (np.diff(self.indices) == 0)
        if same.any():
            twice = np.flatnonzero(same)[0]
            raise ValueError(
                f"{where} holds generation {self.indices[twice]} of "
                f"{documents[self.places[twice]].id!r} "
                f"twice ({same.sum()} such pairs in all): were parts of another store copied into "
                "it? Delete those"
            )
        self.found = np.bincount(self.places, minlength=len(documents))
        self.starts = np.concatenate(([0], self.found.cumsum()))
        self.allotted = not isinstance(counts, int)  # documents may have different G
        if isinstance(counts, int):
            self.count = self.mean = counts
        else:
            self.count = int(counts.max(initial=0))  # the largest G
            self.mean = int(counts.sum()) // max(1, len(counts))
        self.where = where
        self.may_lack = may_lack
        self.kept = np.ones(len(self.rows), dtype=bool)
        self.edited = np.zeros(len(self.rows), dtype=bool)
        self.edit: Callable[[str], str] | None = None
        self.texts: pa.ChunkedArray | None = None  # of all rows, where they are needed
        self.parts: list[Path] = []  # of a store, whose rows are counted through them
        self.part_starts = np.zeros(1, dtype=np.int64)  # the first row of each, and their number

    @classmethod
    def of_store(
        cls,
        store: GenerationStore,
        documents: Sequence[Document],
        counts: int | NDArray[np.integer[Any]],
    ) -> Generations:
        """From the keys of a store, a part at a time.

        Raises:
            FileNotFoundError: the store is empty, or a part was merged meanwhile.
        """
        places = DocumentPlaces(documents)
        parts = store.require_parts()
        found, indices = [], []
        for part in parts:
            table = read_part(part, KEY_COLUMNS)
            found.append(places.of(table))
            indices.append(table["index"].to_numpy())
        arrays = np.concatenate(found), np.concatenate(indices)
        one = cls(*arrays, documents, counts, str(store.folder))
        one.parts, one.part_starts = parts, np.cumsum([0, *map(len, found)])
        return one

    def take(self, documents: NDArray[np.bool_]) -> None:
        """Use generations of those documents alone: bool ``[documents]``."""
        self.kept = self.kept & documents[self.places]

    def select(
        self,
        kept: NDArray[np.bool_],
        edited: NDArray[np.bool_] | None = None,
        edit: Callable[[str], str] | None = None,
    ) -> None:
        """Leave out what the quality gates drop and edit some of the rest.

        Args:
            kept: bool for each of the generations, by document in corpus order, then by index.
            edited: which of them ``edit`` changes: bool, aligned with ``kept``.
            edit: applied to their texts.
        """
        if len(kept) != len(self.rows):
            raise ValueError(
                f"{len(kept)} generations were judged but {self.where} has {len(self.rows)}; "
                "something changed it meanwhile: run the same command again"
            )
        self.kept = kept
        if edited is not None:
            self.edited, self.edit = edited & kept, edit

    def require_all(self, documents: Sequence[Document]) -> None:
        """Raise ValueError unless every document has G generations, or may lack some."""
        short = np.flatnonzero(self.found < self.counts)
        if len(short) and not self.may_lack:
            raise ValueError(
                f"{len(short)} of {len(documents)} documents have fewer than G={self.count} "
                f"generations in {self.where} (the first: {documents[short[0]].id!r} with "
                f"{self.found[short[0]]}); generate them with method.generations={self.count}, or "
                "build the streams with a smaller streams.generations"
            )

    def grid(self) -> NDArray[np.int32]:
        """Position of each generation, -1 where it is dropped or lacking: int32 ``[D, G]``."""
        grid = np.full((len(self.found), self.count), -1, dtype=np.int32)
        used = np.flatnonzero(self.kept)
        grid[self.places[used], self.indices[used]] = used
        return grid

    def text(self, position: int) -> str:
        """One text, edited where it is to be; needs the texts of all rows."""
        assert self.texts is not None
        text = self.texts[int(self.rows[position])].as_py()
        return self.edit(text) if self.edit is not None and self.edited[position] else text

    def of_document(self, place: int) -> dict[int, int]:
        """Position by index of the generations of document ``place`` that are kept, in order."""
        here = range(self.starts[place], self.starts[place + 1])
        return {int(self.indices[position]): position for position in here if self.kept[position]}

    def made_indices(self, place: int) -> set[int]:
        """Indices of all generations of document ``place``, the dropped ones included."""
        return set(self.indices[self.starts[place] : self.starts[place + 1]].tolist())
