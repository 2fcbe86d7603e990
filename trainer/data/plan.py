"""The plan: which pieces of which documents form which window of which batch.

A plan is a pure function of the sources' document lengths, their shares and a seed. Batch ``n`` is
computable from (plan, n) alone, so a checkpoint stores one integer, and 1 or 8 ranks with any
number of workers see the same batches. Every document of a source is used once before any is used
twice, and no token is dropped.

Packing
    ``whole``    each epoch: documents re-shuffled and fitted together; only documents longer than
                 the context are cut, into full windows and a rest.
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
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trainer.data.packing import (
    EpochPacking,
    Window,
    concatenate_and_cut,
    pack_whole,
    shuffle_windows,
)

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
    """

    def __init__(
        self,
        sources: list[Source],
        context_length: int,
        batch_size: int,
        packing: str,
        seed: int,
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
        self.packed = lru_cache(maxsize=2 * len(sources))(self.pack_epoch)
        self.window_order = WindowOrder(self)

    def pack_epoch(self, source: int, epoch: int) -> EpochPacking:
        """Windows of one epoch of one source, in the order they are read."""
        lengths = self.sources[source].lengths
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
                per_pass = len(self.packed(index, 0).offsets) - 1
                windows += tokens / self.source_tokens[index] * per_pass
            steps = int(windows / self.batch_size)
        if steps < 1:
            raise ValueError(
                f"{self.source_tokens[0]} tokens and recipe.epochs={epochs} make less than one "
                f"step of data.batch_size={self.batch_size} x "
                f"data.context_length={self.context_length} tokens; make the batch smaller"
            )
        return steps

    def windows(self, step: int) -> list[Window]:
        """The windows of batch ``step``, ordered so that equal parts cost equal attention."""
        first = step * self.batch_size
        merged = self.window_order.range(first, first + self.batch_size)
        windows = [
            self.packed(source, epoch).window(source, index) for source, epoch, index in merged
        ]
        costs = np.array([int((window.lengths**2).sum()) for window in windows])
        return [windows[index] for index in balanced_order(costs)]

    def tokens_seen(self, steps: int) -> list[int]:
        """Tokens of each source in the first ``steps`` batches."""
        return self.window_order.tokens_before(steps * self.batch_size)

    def epochs_seen(self, steps: int) -> list[float]:
        """Passes over each source in the first ``steps`` batches."""
        seen = self.tokens_seen(steps)
        return [tokens / total for tokens, total in zip(seen, self.source_tokens, strict=True)]

    def density(self) -> list[float]:
        """Share of the windows' places that hold a token, by source, in the first epoch."""
        return [
            self.packed(index, 0).density(self.context_length) for index in range(len(self.sources))
        ]

    def hash(self) -> str:
        """Identity of the order: equal hashes read equal batches."""
        digest = hashlib.sha256(
            repr((VERSION, self.context_length, self.batch_size, self.packing, self.seed)).encode()
        )
        for source in self.sources:
            digest.update(repr((source.name, source.share)).encode())
            digest.update(np.ascontiguousarray(source.lengths, dtype=np.int64).tobytes())
        return digest.hexdigest()[:16]


class WindowOrder:
    """The windows of all sources and epochs in the order of their virtual times.

    Epochs are packed when they are needed; what is known of a window stays small (source, epoch,
    index, tokens), so a run of millions of windows fits in memory.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.next_epoch = [0] * len(plan.sources)
        self.waiting: list[NDArray[np.void]] = [empty_rows() for _ in plan.sources]
        self.ready = empty_rows()  # [K]
        self.ready_tokens = np.zeros((1, len(plan.sources)), dtype=np.int64)  # before window k
        self.lock = threading.Lock()  # the reader thread and the log line both ask

    def horizon(self, source: int) -> float:
        """Virtual time until which the windows of ``source`` are known."""
        tokens = self.next_epoch[source] * self.plan.source_tokens[source]
        return tokens / self.plan.sources[source].share

    def extend(self) -> None:
        """Pack one more epoch of the source that is known least far, and release what is final."""
        plan = self.plan
        source = min(range(len(plan.sources)), key=self.horizon)
        epoch = self.next_epoch[source]
        tokens = plan.packed(source, epoch).window_tokens  # [W]
        rows = empty_rows(len(tokens))
        before = epoch * plan.source_tokens[source] + tokens.cumsum() - tokens
        rows["time"] = (before + tokens / 2) / plan.sources[source].share
        rows["source"], rows["epoch"], rows["index"] = source, epoch, np.arange(len(tokens))
        rows["tokens"] = tokens
        self.waiting[source] = np.concatenate((self.waiting[source], rows))
        self.next_epoch[source] += 1

        final = min(self.horizon(index) for index in range(len(plan.sources)))
        released = np.concatenate([rows[rows["time"] < final] for rows in self.waiting])
        self.waiting = [rows[rows["time"] >= final] for rows in self.waiting]
        released = released[np.argsort(released["time"], kind="stable")]
        counts = np.where(
            released["source"][:, None] == np.arange(len(plan.sources)),
            released["tokens"][:, None],
            0,
        ).cumsum(0)
        self.ready = np.concatenate((self.ready, released))
        self.ready_tokens = np.concatenate((self.ready_tokens, self.ready_tokens[-1] + counts))

    def extend_to(self, windows: int) -> None:
        with self.lock:
            while len(self.ready) < windows:
                self.extend()

    def range(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Source, epoch and index of the windows ``start`` to ``stop``."""
        self.extend_to(stop)
        rows = self.ready[start:stop]
        return list(
            zip(
                rows["source"].tolist(), rows["epoch"].tolist(), rows["index"].tolist(), strict=True
            )
        )

    def tokens_before(self, window: int) -> list[int]:
        """Tokens of each source before window ``window`` of the run."""
        self.extend_to(window)
        tokens: list[int] = self.ready_tokens[window].tolist()
        return tokens


def empty_rows(count: int = 0) -> NDArray[np.void]:
    """Rows of a :class:`WindowOrder`."""
    fields = [("time", "f8"), ("source", "i2"), ("epoch", "i4"), ("index", "i4"), ("tokens", "i4")]
    return np.zeros(count, dtype=fields)


def balanced_order(costs: NDArray[np.int64]) -> list[int]:
    """An order of windows whose halves, quarters, ... have near-equal summed costs.

    Contiguous parts of a batch go to ranks, so this balances them for every power of two at once
    and without knowing the number of ranks. Equal costs keep their order.
    """

    def split(indices: list[int]) -> list[int]:
        if len(indices) < 2 or len({int(costs[index]) for index in indices}) == 1:
            return sorted(indices)
        room = [(len(indices) + 1) // 2, len(indices) // 2]
        halves: list[list[int]] = [[], []]
        sums = [0, 0]
        for index in sorted(indices, key=lambda index: (-costs[index], index)):
            lighter = 0 if sums[0] <= sums[1] else 1
            side = lighter if len(halves[lighter]) < room[lighter] else 1 - lighter
            halves[side].append(index)
            sums[side] += int(costs[index])
        return split(halves[0]) + split(halves[1])

    return split(list(range(len(costs))))


def rank_windows(windows: list[Window], rank: int, world_size: int) -> list[Window]:
    """This rank's contiguous part of a global batch."""
    if len(windows) % world_size:
        raise ValueError(
            f"data.batch_size={len(windows)} windows cannot be divided among {world_size} ranks; "
            "make it a multiple"
        )
    size = len(windows) // world_size
    return windows[rank * size : (rank + 1) * size]
