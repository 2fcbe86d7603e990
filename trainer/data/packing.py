"""Packing: which pieces of which documents share a window."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NOISE = 0.25  # how far "largest" may be off, so that no two epochs begin alike
DRAWS = 4  # pieces that are looked at for one that leaves room for exactly one more


@dataclass(frozen=True)
class Window:
    """The pieces of one training sequence, all from one source."""

    source: int
    documents: NDArray[np.int64]  # int64 [P], index in the source
    starts: NDArray[np.int64]  # int64 [P], first token of the piece in its document
    lengths: NDArray[np.int64]  # int64 [P], tokens of the piece

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())


@dataclass(frozen=True)
class Packing:
    """Windows of one source; window i holds pieces ``offsets[i]:offsets[i+1]``."""

    documents: NDArray[np.int64]  # int64 [P]
    starts: NDArray[np.int64]  # int64 [P]
    lengths: NDArray[np.int64]  # int64 [P]
    offsets: NDArray[np.int64]  # int64 [W+1]

    @property
    def tokens(self) -> int:
        """In all windows together."""
        return int(self.lengths.sum())

    @property
    def window_tokens(self) -> NDArray[np.int64]:
        """int64 ``[W]``."""
        ends = np.concatenate(([0], self.lengths.cumsum()))
        return np.diff(ends[self.offsets])

    def window(self, source: int, index: int) -> Window:
        pieces = slice(self.offsets[index], self.offsets[index + 1])
        return Window(source, self.documents[pieces], self.starts[pieces], self.lengths[pieces])

    def density(self, context_length: int) -> float:
        """Share of the windows' places that hold a token."""
        return float(self.tokens / ((len(self.offsets) - 1) * context_length))


def concatenate_and_cut(
    lengths: NDArray[np.int64], order: NDArray[np.int64], context_length: int
) -> Packing:
    """Documents in ``order`` on one axis, cut every ``context_length`` tokens."""
    ends = lengths[order].cumsum()
    total = int(ends[-1])
    cuts = np.arange(context_length, total, context_length)
    borders = np.unique(np.concatenate(([0], ends, cuts)))
    starts = borders[:-1]
    place = np.searchsorted(ends, starts, side="right")
    document_starts = ends[place] - lengths[order][place]
    windows = -(-total // context_length)
    offsets = np.searchsorted(starts, np.arange(windows + 1) * context_length)
    return Packing(order[place], starts - document_starts, np.diff(borders), offsets)


def pack_whole(
    lengths: NDArray[np.int64], context_length: int, generator: np.random.Generator
) -> Packing:
    """Documents in full windows; those longer than the context give full windows and a rest."""
    full = lengths // context_length  # [N] full windows of each document
    rest = lengths % context_length  # [N]
    long_documents = np.repeat(np.arange(len(lengths)), full)
    first = np.repeat(full.cumsum() - full, full)
    long_starts = (np.arange(len(long_documents)) - first) * context_length

    documents = generator.permutation(np.flatnonzero(rest))
    # The window of each piece, [len(documents)].
    bins = minimum_bin_slack(rest[documents], context_length, generator)
    by_bin = np.argsort(bins, kind="stable")
    documents, bins = documents[by_bin], bins[by_bin]

    windows = int(bins[-1]) + 1 if len(bins) else 0
    offsets = np.concatenate(
        (
            np.arange(len(long_documents)),
            len(long_documents) + np.searchsorted(bins, np.arange(windows + 1)),
        )
    )
    return Packing(
        np.concatenate((long_documents, documents)),
        np.concatenate((long_starts, full[documents] * context_length)),
        np.concatenate((np.full(len(long_documents), context_length), rest[documents])),
        offsets,
    )


def minimum_bin_slack(
    sizes: NDArray[np.int64], capacity: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Window of each piece, int64 ``[N]``; the pieces come in random order.

    A window begins with about the largest piece that is left, while there is most choice for the
    room beside it, goes on with random ones, and ends with one that fills it. This looks for the
    least room left (minimum bin slack, Gupta and Ho 1999), but tries only a few sets; best fit
    leaves 2 to 3 percent of the windows empty where few pieces of similar sizes share one.
    """
    pool = BinPool(sizes.tolist(), capacity)
    chosen = np.empty(len(sizes), dtype=np.int64)
    window = -1
    noise = generator.uniform(1 - NOISE, 1 + NOISE, len(sizes))
    for largest in np.argsort(-sizes * noise, kind="stable").tolist():
        if pool.taken[largest]:
            continue
        window += 1
        piece: int | None = largest
        room = capacity
        while piece is not None:
            chosen[piece] = window
            pool.take(piece)
            room -= pool.sizes[piece]
            piece = pool.fitting(room)
    return chosen


class BinPool:
    """The pieces without a window, in random order and by size."""

    def __init__(self, sizes: list[int], capacity: int) -> None:
        self.sizes = sizes
        self.taken = bytearray(len(sizes))
        self.queue = list(range(len(sizes)))  # with some that are taken
        self.place = 0  # in the queue
        self.by_size: list[list[int]] = [[] for _ in range(capacity + 1)]  # likewise
        for piece, size in enumerate(sizes):
            self.by_size[size].append(piece)
        self.counts = [len(pieces) for pieces in self.by_size]
        self.existing = sum(1 << size for size, count in enumerate(self.counts) if count)  # bits

    def take(self, piece: int) -> None:
        """Give ``piece`` a window."""
        size = self.sizes[piece]
        self.taken[piece] = 1
        self.counts[size] -= 1
        if not self.counts[size]:
            self.existing ^= 1 << size

    def fitting(self, room: int) -> int | None:
        """A random piece, if ``room`` can be filled after it, or else the largest that fits."""
        fits = self.existing & ((2 << room) - 1)
        if not fits:
            return None
        largest = fits.bit_length() - 1
        for _ in range(DRAWS):
            piece = self.draw()
            left = room - self.sizes[piece]
            if left == 0 or (left > 0 and (room > 2 * largest or self.counts[left])):
                return piece
        pieces = self.by_size[largest]
        while self.taken[pieces[-1]]:
            pieces.pop()
        return pieces[-1]

    def draw(self) -> int:
        """The next piece of the random order, which begins again at its end."""
        while True:
            if self.place == len(self.queue):
                self.queue = [piece for piece in self.queue if not self.taken[piece]]
                self.place = 0
            piece = self.queue[self.place]
            self.place += 1
            if not self.taken[piece]:
                return piece


def shuffle_windows(packed: Packing, generator: np.random.Generator) -> Packing:
    """The same windows in random order."""
    order = generator.permutation(len(packed.offsets) - 1)
    counts = np.diff(packed.offsets)[order]
    offsets = np.concatenate(([0], counts.cumsum()))
    pieces = np.repeat(packed.offsets[:-1][order] - offsets[:-1], counts) + np.arange(offsets[-1])
    return Packing(packed.documents[pieces], packed.starts[pieces], packed.lengths[pieces], offsets)
