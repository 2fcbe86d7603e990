"""The plan: which pieces of which documents form which window of which batch.

A plan is a pure function of the sources' document lengths, their shares and a seed. Batch ``n`` is
computable from (plan, n) alone, so a checkpoint stores one integer, and 1 or 8 ranks with any
number of workers see the same batches. Every document of a source is used once before any is used
twice, and no token is dropped.

Packing
    ``whole``    each epoch: documents re-shuffled and fitted together, 32,768 at a time; only
                 documents longer than the context are cut, into full windows and a rest.
    ``stream``   each epoch: documents re-shuffled, concatenated and cut; no window has a gap.
    ``windows``  the paper's way: documents concatenated and cut once, windows permuted each epoch.

Mixing
    An epoch of a source always holds all its tokens, so each window has an exact virtual time: the
    source's tokens before its middle, divided by the source's share. Merging the sources by that
    time keeps every prefix of the run within about one window of the shares, in tokens.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.data.packing import (
    Packing,
    Window,
    concatenate_and_cut,
    pack_whole,
    shuffle_windows,
)

PART_DOCUMENTS = 1 << 15
KEPT_WINDOWS = 1 << 20
Windows = TypeVar("Windows", list[Window], range)  # or their places
VERSION = 2  # part of the hash: raise it when the same inputs give another order


@dataclass(frozen=True)
class Source:
    """One stream as the plan sees it."""

    name: str
    lengths: NDArray[np.int64]  # int64 [N], tokens of each document
    share: float  # share of the tokens of every batch


class Plan:
    """The order of a whole run.

    Args:
        sources: streams with shares that sum to 1.
        context_length: tokens in a window.
        batch_size: windows in a batch, over all ranks.
        packing: ``whole``, ``stream`` or ``windows``.
        seed: of the order of the data.
        part_documents: documents that ``whole`` fits together at once.
    """

    def __init__(
        self,
        sources: list[Source],
        context_length: int,
        batch_size: int,
        packing: str,
        seed: int,
        part_documents: int = PART_DOCUMENTS,
    ) -> None:
        if packing not in ("whole", "stream", "windows"):
            raise ValueError(f"packing={packing!r} is not one of whole, stream, windows")
        if abs(sum(source.share for source in sources) - 1) > 1e-9:
            raise ValueError(f"the shares {[s.share for s in sources]} do not sum to 1")
        for source in sources:
            if len(source.lengths) == 0 or source.lengths.min() < 1:
                raise ValueError(f"the stream {source.name} is empty or has empty documents")
        self.sources = sources
        self.context_length = context_length
        self.batch_size = batch_size
        self.packing = packing
        self.seed = seed
        self.source_tokens = [int(source.lengths.sum()) for source in sources]
        self.part_documents = part_documents
        self.epoch_order = lru_cache(maxsize=2 * len(sources))(self.order_epoch)
        self.packed = lru_cache(maxsize=3 * len(sources))(self.pack_part)
        self.window_order = WindowOrder(self)

    def parts(self, source: int) -> int:
        """In how many parts an epoch of a source is packed."""
        if self.packing != "whole":
            return 1
        return -(-len(self.sources[source].lengths) // self.part_documents)

    def order_epoch(self, source: int, epoch: int) -> EpochOrder:
        """Which documents of a source are in which part of an epoch."""
        lengths = self.sources[source].lengths
        generator = np.random.default_rng((self.seed, source, epoch + 1))
        order = generator.permutation(np.arange(len(lengths), dtype=np.int32))
        borders = np.linspace(0, len(lengths), self.parts(source) + 1).astype(np.int64)
        tokens = np.add.reduceat(lengths[order], borders[:-1])
        return EpochOrder(order, borders, np.concatenate(([0], tokens.cumsum())))

    def pack_part(self, source: int, part: int) -> Packing:
        """Windows of one part of one epoch of one source, in the order they are read.

        Args:
            source: its index.
            part: counted through all epochs.
        """
        lengths = self.sources[source].lengths
        epoch, place = divmod(part, self.parts(source))
        if self.parts(source) > 1:
            documents = self.epoch_order(source, epoch).documents(place)
            generator = np.random.default_rng((self.seed, source, epoch + 1, place))
            packed = pack_whole(lengths[documents], self.context_length, generator)
            packed = replace(packed, documents=documents[packed.documents])
            return shuffle_windows(packed, generator)
        generator = np.random.default_rng((self.seed, source, epoch + 1))
        if self.packing == "windows":
            once = np.random.default_rng((self.seed, source, 0))
            packed = concatenate_and_cut(
                lengths, once.permutation(len(lengths)), self.context_length
            )
            return shuffle_windows(packed, generator)
        if self.packing == "stream":
            order = generator.permutation(len(lengths))
            packed = concatenate_and_cut(lengths, order, self.context_length)
        else:
            packed = pack_whole(lengths, self.context_length, generator)
        return shuffle_windows(packed, generator)

    def tokens_before_part(self, source: int, part: int) -> int:
        """Tokens of the source that are read before this part of it."""
        epoch, place = divmod(part, self.parts(source))
        tokens = epoch * self.source_tokens[source]
        return tokens + (int(self.epoch_order(source, epoch).tokens[place]) if place else 0)

    def steps(self, epochs: float) -> int:
        """Batches in which the first source is read ``epochs`` times.

        With ``packing=windows`` it is the paper's ``int(int(steps of an epoch) * E / (1 - w))``
        (2603.18534: 777 steps for its 203,867,748 tokens); the others count the windows they fill.
        """
        base = self.sources[0]
        if self.packing == "windows":
            per_epoch = self.source_tokens[0] // (self.context_length * self.batch_size)
            steps = int(per_epoch * epochs / base.share)
        else:
            windows = 0.0
            for index, source in enumerate(self.sources):
                tokens = epochs * self.source_tokens[0] * (source.share / base.share)
                packed = self.packed(index, 0)
                per_pass = len(packed.window_tokens) * (self.source_tokens[index] / packed.tokens)
                windows += tokens / self.source_tokens[index] * per_pass
            steps = int(windows / self.batch_size)
        if steps < 1:
            raise ValueError(
                f"{self.source_tokens[0]} tokens and recipe.epochs={epochs} make less than one "
                f"step of data.batch_size={self.batch_size} x "
                f"data.context_length={self.context_length} tokens; make the batch smaller"
            )
        return steps

    def windows(self, step: int, rank: int = 0, world_size: int = 1) -> list[Window]:
        """The windows of batch ``step``, or a rank's equal share of them.

        They are ordered so that equal parts cost equal attention.
        """
        first = step * self.batch_size
        merged = self.window_order.range(first, first + self.batch_size)
        costs = [
            int(self.packed(source, part).window_costs[index]) for source, part, index in merged
        ]
        chosen = balanced_order(costs, rank_windows(range(len(costs)), rank, world_size))
        return [
            self.packed(source, part).window(source, index)
            for source, part, index in (merged[place] for place in chosen)
        ]

    def tokens_seen(self, steps: int) -> list[int]:
        """Tokens of each source in the first ``steps`` batches."""
        return self.window_order.tokens_before(steps * self.batch_size)

    def epochs_seen(self, steps: int) -> list[float]:
        """Passes over each source in the first ``steps`` batches."""
        seen = self.tokens_seen(steps)
        return [tokens / total for tokens, total in zip(seen, self.source_tokens, strict=True)]

    def density(self) -> list[float]:
        """Share of the windows' places that hold a token, by source, in the first part."""
        return [
            self.packed(index, 0).density(self.context_length) for index in range(len(self.sources))
        ]

    def position(self, step: int) -> Position:
        """What a checkpoint after ``step`` steps keeps, so that nothing is packed again."""
        return self.window_order.position(step * self.batch_size)

    def resume(self, position: Position) -> None:
        """Go on from a position of an equal plan."""
        self.window_order.go_to(position)

    def hash(self) -> str:
        """Identity of the order: equal hashes read equal batches."""
        digest = hashlib.sha256(
            repr((VERSION, self.context_length, self.batch_size, self.packing, self.seed)).encode()
        )
        for source in self.sources:
            digest.update(repr((source.name, source.share)).encode())
            digest.update(np.ascontiguousarray(source.lengths, dtype=np.int64).data)
        if max(self.parts(index) for index in range(len(self.sources))) > 1:
            digest.update(repr(self.part_documents).encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class EpochOrder:
    """The random order of a source's documents in one epoch, and its parts."""

    order: NDArray[np.int32]  # int32 [N]
    borders: NDArray[np.int64]  # int64 [parts + 1], places in ``order``
    tokens: NDArray[np.int64]  # int64 [parts + 1], tokens before each part

    def documents(self, part: int) -> NDArray[np.int64]:
        return self.order[self.borders[part] : self.borders[part + 1]].astype(np.int64)


@dataclass(frozen=True)
class Position:
    """Where the order of the windows can be taken up; a part is one of all epochs."""

    window: int  # of the run
    tokens: list[int]  # [S] of each source before that window
    next_parts: list[int]  # [S] the first that is not packed
    waiting_parts: list[int]  # [S] the first that has windows behind that one


@dataclass(frozen=True)
class Block:
    """Windows in their final order."""

    rows: NDArray[np.void]  # [K]
    tokens: NDArray[np.int64]  # int64 [K + 1, S] of each source before each window of the run
    start: Position

    @property
    def stop(self) -> int:
        return self.start.window + len(self.rows)


class WindowOrder:
    """The windows of all sources and epochs in the order of their virtual times.

    Parts of epochs are packed when they are needed. Only the last windows are kept: earlier ones,
    which nobody asks for in training, are found again from the beginning.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.lock = threading.Lock()  # the reader thread and the log line both ask
        none = [0] * len(plan.sources)
        self.start(Position(0, none, none, none))

    def start(self, position: Position) -> None:
        """Know what is known at a position."""
        self.blocks: deque[Block] = deque()
        self.stop = position.window
        self.tokens = position.tokens
        self.next_parts = list(position.next_parts)
        final = self.final()
        self.waiting = []  # rows of each source
        for source, (first, stop) in enumerate(
            zip(position.waiting_parts, position.next_parts, strict=True)
        ):
            rows = np.concatenate(
                [empty_rows(), *(self.rows(source, part) for part in range(first, stop))]
            )
            self.waiting.append(rows[rows["time"] >= final])

    def final(self) -> float:
        """Virtual time until which the windows of every source are known."""
        return min(map(self.horizon, range(len(self.plan.sources))))

    def horizon(self, source: int) -> float:
        """Virtual time until which the windows of ``source`` are known."""
        tokens = self.plan.tokens_before_part(source, self.next_parts[source])
        return tokens / self.plan.sources[source].share

    def rows(self, source: int, part: int) -> NDArray[np.void]:
        """The windows of a part."""
        tokens = self.plan.packed(source, part).window_tokens  # [W]
        rows = empty_rows(len(tokens))
        before = self.plan.tokens_before_part(source, part) + tokens.cumsum() - tokens
        rows["time"] = (before + tokens / 2) / self.plan.sources[source].share
        rows["source"], rows["part"], rows["index"] = source, part, np.arange(len(tokens))
        rows["tokens"] = tokens
        return rows

    def extend(self) -> None:
        """Pack one more part of the source that is known least far, and release what is final."""
        sources = range(len(self.plan.sources))
        start = Position(
            self.stop,
            self.tokens,
            list(self.next_parts),
            [
                int(self.waiting[one]["part"][0])
                if len(self.waiting[one])
                else self.next_parts[one]
                for one in sources
            ],
        )
        source = min(sources, key=self.horizon)
        added = self.rows(source, self.next_parts[source])
        self.waiting[source] = np.concatenate((self.waiting[source], added))
        self.next_parts[source] += 1

        final = self.final()
        released = np.concatenate([rows[rows["time"] < final] for rows in self.waiting])
        self.waiting = [rows[rows["time"] >= final] for rows in self.waiting]
        released = released[np.argsort(released["time"], kind="stable")]
        if not len(released):
            return
        of_source = released["source"][:, None] == np.arange(len(sources))
        counts = np.where(of_source, released["tokens"][:, None], 0).cumsum(0)
        tokens = np.concatenate((np.zeros((1, len(sources)), np.int64), counts)) + self.tokens
        self.blocks.append(Block(released, tokens, start))
        self.stop, self.tokens = self.blocks[-1].stop, tokens[-1].tolist()
        while self.stop - self.blocks[0].stop > KEPT_WINDOWS:
            self.blocks.popleft()

    def block_of(self, window: int) -> Block:
        """The block that holds a window of the run; the lock is held."""
        if window < (self.blocks[0].start.window if self.blocks else self.stop):
            none = [0] * len(self.plan.sources)
            self.start(Position(0, none, none, none))
        while self.stop <= window:
            self.extend()
        return next(block for block in reversed(self.blocks) if block.start.window <= window)

    def range(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Source, part and index of the windows ``start`` to ``stop``."""
        found: list[tuple[int, int, int]] = []
        with self.lock:
            while start + len(found) < stop:
                block = self.block_of(start + len(found))
                first = start + len(found) - block.start.window
                rows = block.rows[first : stop - block.start.window]
                names = ("source", "part", "index")
                found += zip(*(rows[name].tolist() for name in names), strict=True)
        return found

    def tokens_before(self, window: int) -> list[int]:
        """Tokens of each source before window ``window`` of the run."""
        with self.lock:
            block = self.block_of(window)
            tokens: list[int] = block.tokens[window - block.start.window].tolist()
            return tokens

    def position(self, window: int) -> Position:
        """The last place before a window where the order can be taken up."""
        with self.lock:
            return self.block_of(window).start

    def go_to(self, position: Position) -> None:
        with self.lock:
            self.start(position)


def empty_rows(count: int = 0) -> NDArray[np.void]:
    """Rows of a :class:`WindowOrder`."""
    fields = [("time", "f8"), ("source", "i2"), ("part", "i4"), ("index", "i4"), ("tokens", "i4")]
    return np.zeros(count, dtype=fields)


def balanced_order(costs: Sequence[int], wanted: range | None = None) -> list[int]:
    """An order of windows whose halves, quarters, ... have near-equal summed costs.

    Contiguous parts of a batch go to ranks, so this balances them for every power of two at once
    and without knowing the number of ranks. Equal costs keep their order.

    Args:
        costs: of each window.
        wanted: the places of the order that are returned; None: all.
    """
    wanted = wanted if wanted is not None else range(len(costs))

    def split(indices: list[int], first: int) -> list[int]:
        """Of windows that come with falling costs, for places from ``first`` on."""
        if first >= wanted.stop or first + len(indices) <= wanted.start:
            return []
        if len(indices) < 2 or costs[indices[0]] == costs[indices[-1]]:
            return sorted(indices)[max(0, wanted.start - first) : wanted.stop - first]
        left: list[int] = []
        right: list[int] = []
        room_left, room_right = (len(indices) + 1) // 2, len(indices) // 2
        ahead = 0  # what the left half costs more
        for index in indices:
            if (len(left) < room_left) if ahead <= 0 else (len(right) == room_right):
                left.append(index)
                ahead += costs[index]
            else:
                right.append(index)
                ahead -= costs[index]
        return split(left, first) + split(right, first + room_left)

    return split(sorted(range(len(costs)), key=lambda index: (-costs[index], index)), 0)


def rank_windows(windows: Windows, rank: int, world_size: int) -> Windows:
    """This rank's contiguous part of a global batch."""
    if len(windows) % world_size:
        raise ValueError(
            f"data.batch_size={len(windows)} windows cannot be divided among {world_size} ranks; "
            "make it a multiple"
        )
    size = len(windows) // world_size
    return windows[rank * size : (rank + 1) * size]
