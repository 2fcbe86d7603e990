"""The texts of a stream become token ids, each text once: what is there already is looked up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gen.corpus.documents import Document
from gen.generations.by_document import Generations
from gen.generations.store import by_part, texts_of_part
from gen.megadocs.assembly import Layout
from gen.megadocs.encoding import Encoding
from gen.megadocs.texts import keys_of_edited, keys_of_part
from gen.megadocs.tokens import (
    DamagedTokensError,
    IdReader,
    Spans,
    TokenStore,
    add_part,
    as_keys,
    key_of,
)
from gen.work import Unit, Work
from trainer.data.format import REAL

UNIT = 1 << 22  # bytes of text that are tokenized by one process at a time
UNIT_ROWS = 1 << 14  # generations, whose lengths are not known
KEYS_AT_ONCE = 1 << 16  # texts whose hashes are in memory
ATTEMPTS = 3  # to have everything, where damaged parts are found meanwhile


class DocumentTexts:
    """Real documents, by place."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self.documents = documents

    def keys(
        self, places: NDArray[np.integer[Any]]
    ) -> Iterator[tuple[NDArray[np.integer[Any]], NDArray[np.uint64]]]:
        """Hashes of some documents, uint64 ``[K, 2]``, and which of the places they are of."""
        for start in range(0, len(places), KEYS_AT_ONCE):
            some = places[start : start + KEYS_AT_ONCE]
            each, which = np.unique(some, return_inverse=True)  # documents may be cut
            texts = (self.documents[place].text for place in each.tolist())
            keys = as_keys(key_of(text.encode()) for text in texts)
            yield np.arange(start, start + len(some)), keys[which]

    def units(self, store: TokenStore, places: NDArray[np.integer[Any]]) -> Iterator[Unit]:
        """Work that tokenizes the documents at some places."""
        sizes = np.array([len(self.documents[place].text) for place in places.tolist()])
        groups = (sizes.cumsum() - sizes) // UNIT
        for group in np.unique(groups).tolist():
            own = places[groups == group]
            size = int(sizes[groups == group].sum())
            yield Unit(f"documents-{own[0]}", size, partial(self.prepare, store.folder, own))

    def prepare(self, folder: Path, places: NDArray[np.integer[Any]]) -> Callable[[], None]:
        return partial(add_part, folder, [self.documents[place].text for place in places.tolist()])


class GenerationTexts:
    """The generations of one style, by position."""

    def __init__(self, generations: Generations, root: Path, work: Work) -> None:
        self.generations = generations
        kept = root / "tokens" / "texts" / Path(generations.where).name
        self.calls = [
            partial(keys_of_part, part, kept / f"{part.stem}.keys") for part in generations.parts
        ]
        work.run(
            [
                Unit(part.stem, part.stat().st_size, partial(partial, call))
                for part, call in zip(generations.parts, self.calls, strict=True)
                if not (kept / f"{part.stem}.keys").exists()
            ],
            kept / "locks",
            f"{kept.name}: hashing texts",
            "B",
        )

    def keys(
        self, positions: NDArray[np.integer[Any]]
    ) -> Iterator[tuple[NDArray[np.integer[Any]], NDArray[np.uint64]]]:
        """Hashes of some texts, uint64 ``[K, 2]``, and which of the positions they are of."""
        generations = self.generations
        for part, own in self.by_part(positions):
            rows = generations.rows[positions[own]] - generations.part_starts[part]
            keys = self.calls[part]()[rows]
            edited = np.flatnonzero(generations.edited[positions[own]])
            if len(edited):
                assert generations.edit is not None
                path = generations.parts[part]
                keys[edited] = keys_of_edited(path, rows[edited], generations.edit)
            yield own, keys

    def by_part(
        self, positions: NDArray[np.integer[Any]]
    ) -> Iterator[tuple[int, NDArray[np.integer[Any]]]]:
        """Which of some positions are in each part, in the order of their rows there."""
        return by_part(self.generations.rows[positions], self.generations.part_starts)

    def units(self, store: TokenStore, positions: NDArray[np.integer[Any]]) -> Iterator[Unit]:
        """Work that tokenizes some of the generations."""
        for part, places in self.by_part(positions):
            own = positions[places]
            path = self.generations.parts[part]
            rows = int(np.diff(self.generations.part_starts)[part])
            for start in range(0, len(own), UNIT_ROWS):
                some = own[start : start + UNIT_ROWS]
                yield Unit(
                    f"{path.parent.name}-{path.stem}-{start}",
                    path.stat().st_size * len(some) // rows,
                    partial(self.prepare, store.folder, part, some),
                )

    def prepare(
        self, folder: Path, part: int, positions: NDArray[np.integer[Any]]
    ) -> Callable[[], None]:
        generations = self.generations
        rows = generations.rows[positions] - generations.part_starts[part]
        edited = generations.edited[positions]
        return partial(
            tokenize_rows, folder, generations.parts[part], rows, edited, generations.edit
        )


def tokenize_rows(
    folder: Path,
    part: Path,
    rows: NDArray[np.integer[Any]],
    edited: NDArray[np.bool_],
    edit: Callable[[str], str] | None,
) -> None:
    """Tokenize some rows of a part of generations into the token store in ``folder``."""
    texts = texts_of_part(part, rows)
    if edit is not None:
        changed = zip(texts, edited.tolist(), strict=True)
        texts = [edit(text) if change else text for text, change in changed]
    add_part(folder, texts)


def tokenized(
    layout: Layout,
    documents: Sequence[Document],
    styles: Sequence[Generations],
    encoding: Encoding,
    root: Path,
    work: Work,
) -> tuple[Spans, list[Path]]:
    """Where the ids of every member's text lie, and the files that they lie in.

    What no stream needed before is tokenized.

    Raises:
        DamagedTokensError: it is damaged again and again.
    """
    stores = [TokenStore(root, encoding.beginning), TokenStore(root, encoding.continuing)]
    begins = encoding.begins(layout)
    if stores[0].folder == stores[1].folder:  # of tokenizers that put nothing before a text
        del stores[1]
        begins[:] = True
    sources: list[DocumentTexts | GenerationTexts] = [DocumentTexts(documents)]
    sources += [GenerationTexts(style, root, work) for style in styles]
    source = np.where(layout.kind == REAL, 0, layout.style + 1).astype(np.int16)
    for _ in range(ATTEMPTS):
        spans = Spans.none(len(layout.kind))
        units: list[Unit] = []
        parts: list[Path] = []
        for store, wanted in zip(stores, (begins, ~begins), strict=False):
            store.load()
            for number, texts in enumerate(sources):
                members = np.flatnonzero(wanted & (source == number)).astype(np.int32)
                found = np.full(len(members), -1, dtype=np.int32)  # of each, its text's number
                for where, keys in texts.keys(layout.position[members]):
                    found[where] = store.find(keys)
                lacking = np.unique(layout.position[members[found < 0]])
                units += texts.units(store, lacking)
                if not units:
                    store.put_spans(spans, members, found, len(parts))
            parts += store.parts
            store.forget()
        if not units:
            return spans, parts
        work.run(units, root / "tokens" / "locks", "tokenizing", "B")
    raise DamagedTokensError(f"{root / 'tokens'} is damaged again and again: is the disk failing?")


def document_starts(
    documents: Sequence[Document], tokenizer: Tokenizer, root: Path, work: Work
) -> Callable[[int], list[int]]:
    """The character where each token of a document starts, by the document's place."""
    store = TokenStore(root, tokenizer, starts=True)
    texts = DocumentTexts(documents)
    store.load()
    places = np.arange(len(documents))

    def find() -> NDArray[np.int32]:
        return np.concatenate([empty, *(store.find(keys) for _, keys in texts.keys(places))])

    empty = np.zeros(0, dtype=np.int32)
    lacking = np.flatnonzero(find() < 0)
    work.run(list(texts.units(store, lacking)), root / "tokens" / "locks", "cutting", "B")
    store.load()
    spans = Spans.none(len(documents))
    store.put_spans(spans, places, find(), 0)
    reader = IdReader(store.parts)

    def starts(place: int) -> list[int]:
        content = reader.read(
            *(int(c[place]) for c in (spans.part, spans.first, spans.count, spans.checksum))
        )
        characters: list[int] = np.frombuffer(content, dtype="<u4").tolist()
        return characters

    return starts
