"""Packing: which pieces of which documents share a window."""

from __future__ import annotations

import functools
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
        return self.sums(self.lengths)

    @functools.cached_property
    def window_costs(self) -> NDArray[np.int64]:
        """Squares of the pieces' lengths, as attention pays for them: int64 ``[W]``."""
        return self.sums(self.lengths**2)

    def sums(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Values of the pieces ``[P]``, summed over each window: int64 ``[W]``."""
        ends = np.concatenate(([0], values.cumsum()))
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

    It is one function without calls because it runs in the thread beside the training, which waits
    while that computes; ``tests/trainer/data/test_packing.py`` has it in words.
    """
    size_of = sizes.tolist()
    taken = bytearray(len(size_of))
    queue = list(range(len(size_of)))  # in random order, with some that are taken
    place = 0  # in the queue
    by_size = np.argsort(sizes, kind="stable").tolist()
    there = np.bincount(sizes, minlength=capacity + 1)
    counts = there.tolist()  # pieces without a window, of each size
    ends = there.cumsum().tolist()  # in ``by_size``, of each size; behind it all are taken
    existing = int.from_bytes(np.packbits(there > 0, bitorder="little").tobytes(), "little")

    chosen = [0] * len(size_of)
    window = -1
    noise = generator.uniform(1 - NOISE, 1 + NOISE, len(size_of))
    for piece in np.argsort(-sizes * noise, kind="stable").tolist():
        if taken[piece]:
            continue
        window += 1
        room = capacity
        while True:
            chosen[piece] = window
            taken[piece] = 1
            size = size_of[piece]
            room -= size
            counts[size] -= 1
            if not counts[size]:
                existing ^= 1 << size
            fits = existing & ((2 << room) - 1)  # bit n: there are pieces of n tokens
            if not fits:
                break
            largest = fits.bit_length() - 1
            for _ in range(DRAWS):
                while True:  # until the queue gives one that is not taken
                    if place == len(queue):
                        queue = [one for one in queue if not taken[one]]
                        place = 0
                    piece = queue[place]
                    place += 1
                    if not taken[piece]:
                        break
                left = room - size_of[piece]
                if left == 0 or (left > 0 and (room > 2 * largest or counts[left])):
                    break
            else:
                end = ends[largest] - 1
                while taken[by_size[end]]:
                    end -= 1
                ends[largest] = end + 1
                piece = by_size[end]
    return np.array(chosen, dtype=np.int64)


def shuffle_windows(packed: Packing, generator: np.random.Generator) -> Packing:
    """The same windows in random order."""
    order = generator.permutation(len(packed.offsets) - 1)
    counts = np.diff(packed.offsets)[order]
    offsets = np.concatenate(([0], counts.cumsum()))
    pieces = np.repeat(packed.offsets[:-1][order] - offsets[:-1], counts) + np.arange(offsets[-1])
    return Packing(packed.documents[pieces], packed.starts[pieces], packed.lengths[pieces], offsets)
