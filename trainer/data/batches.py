"""Windows of a plan become packed batches: one token axis, segment borders, targets.

The masks differ only in where the segment borders are put:

    none      one segment a window: attention and targets cross documents, as in the paper's
              headline runs
    megadoc   one segment a piece of a megadoc
    document  a megadoc is also cut between its members

The target of a token is the next token of its document. At the end of a document it is the first
token of the next one if both share a segment, otherwise there is none (-100). A document that a
window border cuts keeps all its targets: the last token of a piece predicts the first of the next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.segments import padded_borders
from trainer.config.schema import Mask
from trainer.data.mds import MegadocStream, Sample, StreamManifest
from trainer.data.packing import Window
from trainer.data.plan import Plan

NO_TARGET = -100
ON_HOST = ("target_documents", "target_positions")
PREFETCHED_STEPS = 4
EXPECTED_STEPS = 8  # further, for which samples of a remote stream are on their way


@dataclass(frozen=True)
class PackedBatch:
    """Some windows on one token axis of T = windows x context_length places.

    Windows follow each other without gaps; what they leave free lies after the last border, where
    attention gives 0 and nothing is predicted.
    """

    input_ids: Tensor  # int64 [T]
    targets: Tensor  # int64 [T], -100 where there is nothing to predict
    positions: Tensor  # int64 [T], place in the segment
    cu_seqlens: Tensor  # int32 [S+1], the last border repeated until S is a power of two
    max_seqlen: int  # upper bound of the segment lengths: a power of two, or the context length
    target_documents: Tensor  # int64 [T], index in its stream of the document of the target
    target_positions: Tensor  # int64 [T], place of the target in its document
    tokens: int  # places that hold a token
    valid_targets: int

    def to(self, device: torch.device) -> PackedBatch:
        """The batch with what a model reads on ``device``; what scores are sorted by stays."""
        if device.type == "cpu":
            return self
        moved = {
            field.name: getattr(self, field.name).pin_memory().to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), Tensor) and field.name not in ON_HOST
        }
        return dataclasses.replace(self, **moved)


class Samples(Protocol):
    """What :func:`collate` reads: a :class:`MegadocStream`, or random tokens that are like one."""

    lengths: NDArray[np.int64]  # int64 [N]

    @property
    def manifest(self) -> StreamManifest: ...

    @property
    def has_members(self) -> bool: ...

    def read_tokens(
        self,
        out: NDArray[np.uint32],
        places: NDArray[np.int64],
        documents: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
    ) -> None: ...

    def member_ends(self, document: int) -> NDArray[np.int64]: ...

    def __getitem__(self, index: int) -> Sample: ...


def collate(
    windows: Sequence[Window],
    streams: Sequence[Samples],
    mask: Mask,
    context_length: int,
) -> PackedBatch:
    """Read the documents of ``windows`` and put them on one token axis.

    The borders have as many segments as the windows, rounded up to a power of two as the longest
    segment is; a mask of ``none`` has one segment a window and the same sizes always. Nothing is
    done token by token in Python: the thread that trains would wait for it.
    """
    pieces = Pieces.of(windows)
    documents, starts, lengths, ends = pieces.documents, pieces.starts, pieces.lengths, pieces.ends
    used = int(ends[-1])
    places = len(windows) * context_length
    input_ids = np.full(places, streams[0].manifest.eos_id, dtype=np.int64)
    input_ids[:used], following = read_pieces(pieces, streams)

    targets = np.full(places, NO_TARGET, dtype=np.int64)
    targets[: used - 1] = input_ids[1:used]
    targets[ends - 1] = following
    target_documents = np.zeros(places, dtype=np.int64)
    target_documents[:used] = np.repeat(documents, lengths)
    target_positions = np.zeros(places, dtype=np.int64)
    target_positions[:used] = np.arange(1, used + 1) + np.repeat(starts - ends + lengths, lengths)

    borders = np.concatenate(([0], ends))
    if mask is Mask.none:
        begins = starts == 0  # [P] of these, a document that follows another in its window
        begins[pieces.of_windows[:-1]] = False
        before = ends[begins] - lengths[begins] - 1  # predicts its first token
        targets[before] = input_ids[before + 1]
        target_documents[before] = documents[begins]
        target_positions[before] = 0
        borders = borders[pieces.of_windows]
    elif mask is Mask.document:
        cuts = member_cuts(pieces, streams)
        targets[cuts - 1] = NO_TARGET
        borders = np.unique(np.concatenate((borders, cuts)))
    positions = np.zeros(places, dtype=np.int64)
    positions[:used] = np.arange(used) - np.repeat(borders[:-1], np.diff(borders))
    if mask is Mask.none:
        cu_seqlens, longest = torch.from_numpy(borders.astype(np.int32)), context_length
    else:
        cu_seqlens, longest = padded_borders(borders.tolist(), context_length)
    return PackedBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(targets),
        torch.from_numpy(positions),
        cu_seqlens,
        longest,
        torch.from_numpy(target_documents),
        torch.from_numpy(target_positions),
        used,
        int(np.count_nonzero(targets != NO_TARGET)),
    )


@dataclass(frozen=True)
class Pieces:
    """The pieces of some windows, one after the other on the token axis: int64 ``[P]``."""

    sources: NDArray[np.int64]
    documents: NDArray[np.int64]
    starts: NDArray[np.int64]  # first token in its document
    lengths: NDArray[np.int64]
    ends: NDArray[np.int64]  # on the axis
    of_windows: NDArray[np.int64]  # int64 [W+1]: the first piece of each window

    @classmethod
    def of(cls, windows: Sequence[Window]) -> Pieces:
        counts = [len(window.documents) for window in windows]
        lengths = np.concatenate([window.lengths for window in windows])
        return cls(
            np.repeat([window.source for window in windows], counts),
            np.concatenate([window.documents for window in windows]),
            np.concatenate([window.starts for window in windows]),
            lengths,
            lengths.cumsum(),
            np.cumsum([0, *counts]),
        )


def read_pieces(
    pieces: Pieces, streams: Sequence[Samples]
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """The tokens of all pieces, and the one after each (-100 where its document ends there).

    Raises:
        OSError: a remote shard cannot be reached.
        ValueError: a shard is corrupted or holds token ids outside the vocabulary.
    """
    last = pieces.starts + pieces.lengths  # in its document
    own = [np.flatnonzero(pieces.sources == source) for source in range(len(streams))]
    more = np.zeros(len(last), dtype=bool)  # pieces after which their document goes on
    for stream, mine in zip(streams, own, strict=True):
        more[mine] = last[mine] < stream.lengths[pieces.documents[mine]]
    counts = pieces.lengths + more
    places = counts.cumsum() - counts
    tokens = np.empty(int(counts.sum()), dtype=np.uint32)
    for stream, mine in zip(streams, own, strict=True):
        if len(mine):
            stream.read_tokens(
                tokens, places[mine], pieces.documents[mine], pieces.starts[mine], counts[mine]
            )
    if tokens.max() >= min(stream.manifest.vocab_size for stream in streams):
        for source, document in zip(pieces.sources, pieces.documents, strict=True):
            streams[source][int(document)]  # says which sample it is
    following = np.full(len(last), NO_TARGET, dtype=np.int64)
    if more.any():
        extra = (places + pieces.lengths)[more]
        following[more] = tokens[extra]
        tokens = np.delete(tokens, extra)
    return tokens, following


def member_cuts(pieces: Pieces, streams: Sequence[Samples]) -> NDArray[np.int64]:
    """Where members end within pieces or with them, on the axis."""
    cuts = [np.zeros(0, dtype=np.int64)]
    for source, document, start, length, end in zip(
        pieces.sources.tolist(),
        pieces.documents.tolist(),
        pieces.starts.tolist(),
        pieces.lengths.tolist(),
        pieces.ends.tolist(),
        strict=True,
    ):
        stream = streams[source]
        if stream.manifest.members_are_documents and stream.has_members:
            members = stream.member_ends(document) - start
            cuts.append(members[(members > 0) & (members <= length)] + (end - length))
    return np.concatenate(cuts)


def check_batch(batch_size: int, world_size: int, micro_batch_size: int | None) -> int:
    """The windows in one forward pass of one rank.

    Raises:
        ValueError: a batch cannot be divided evenly.
    """
    share = batch_size // world_size
    size = micro_batch_size or max(1, share)
    if batch_size % world_size or share % size:
        raise ValueError(
            f"data.batch_size={batch_size} windows cannot be divided among {world_size} ranks in "
            f"micro-batches of data.micro_batch_size={size}; make it a multiple of both"
        )
    return size


class BatchLoader:
    """This rank's micro-batches of every step, read ahead by a thread.

    Iterating gives ``(step, [PackedBatch, ...])``; the global batch of a step is the same for any
    number of ranks and any micro-batch size. ``waited`` is the time the last step stood without
    data, in seconds.
    """

    def __init__(
        self,
        plan: Plan,
        streams: Sequence[MegadocStream],
        mask: Mask,
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int | None,
        start_step: int,
        stop_step: int,
    ) -> None:
        self.plan = plan
        self.streams = streams
        self.mask = mask
        self.rank = rank
        self.world_size = world_size
        self.steps = range(start_step, stop_step)
        self.waited = 0.0
        self.micro_batch_size = check_batch(plan.batch_size, world_size, micro_batch_size)

    def windows(self, step: int) -> list[Window]:
        """This rank's windows of one step."""
        return self.plan.windows(step, self.rank, self.world_size)

    def windows_ahead(self) -> Iterator[list[Window]]:
        """This rank's windows of every step; their documents are asked for some steps before."""
        coming: deque[list[Window]] = deque()
        for step in self.steps:
            coming.append(self.windows(step))
            for window in coming[-1]:
                self.streams[window.source].expect(window.documents)
            if len(coming) > EXPECTED_STEPS:
                yield coming.popleft()
        yield from coming

    def read(self, windows: list[Window]) -> list[PackedBatch]:
        """Micro-batches of a step's windows."""
        return [
            collate(
                windows[first : first + self.micro_batch_size],
                self.streams,
                self.mask,
                self.plan.context_length,
            )
            for first in range(0, len(windows), self.micro_batch_size)
        ]

    def __iter__(self) -> Iterator[tuple[int, list[PackedBatch]]]:
        ready: queue.Queue[list[PackedBatch] | BaseException] = queue.Queue(PREFETCHED_STEPS)
        stopped = threading.Event()

        def offer(item: list[PackedBatch] | BaseException) -> None:
            """Put ``item`` in the queue, unless the reader is told to end."""
            while not stopped.is_set():
                with contextlib.suppress(queue.Full):
                    ready.put(item, timeout=0.1)
                    return

        def read_ahead() -> None:
            """Read the steps in their order, a few ahead of the training."""
            try:
                for windows in self.windows_ahead():
                    if stopped.is_set():
                        return
                    offer(self.read(windows))
            except BaseException as error:  # shown where the batch is wanted
                offer(error)

        thread = threading.Thread(target=read_ahead, name="batch-reader", daemon=True)
        thread.start()
        try:
            for step in self.steps:
                began = time.monotonic()
                batch = ready.get()
                self.waited = time.monotonic() - began
                if isinstance(batch, BaseException):
                    raise batch
                yield step, batch
        finally:
            stopped.set()
            thread.join()
