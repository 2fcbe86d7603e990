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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.config.schema import Mask
from trainer.data.mds import MegadocStream
from trainer.data.packing import Window
from trainer.data.plan import Plan, rank_windows

NO_TARGET = -100
PREFETCHED_STEPS = 4


@dataclass(frozen=True)
class PackedBatch:
    """Some windows on one token axis of T = windows x context_length places.

    Windows follow each other without gaps; what they leave free lies after the last border, where
    attention gives 0 and nothing is predicted.
    """

    input_ids: Tensor  # int64 [T]
    targets: Tensor  # int64 [T], -100 where there is nothing to predict
    positions: Tensor  # int64 [T], place in the segment
    cu_seqlens: Tensor  # int32 [S+1], padded to a fixed S by repeating the last border
    max_seqlen: int  # upper bound of the segment lengths, the same in every batch of a run
    target_documents: Tensor  # int64 [T], index in its stream of the document of the target
    target_positions: Tensor  # int64 [T], place of the target in its document
    tokens: int  # places that hold a token
    valid_targets: int

    def to(self, device: torch.device) -> PackedBatch:
        """The batch with its tensors on ``device``."""
        if device.type == "cpu":
            return self
        moved = {
            field.name: getattr(self, field.name).pin_memory().to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


class SegmentBounds(NamedTuple):
    """What holds for every window of a run, so that no shape and no bound ever changes."""

    most: int  # segments in one window
    longest: int  # tokens in one segment


def segment_bounds(
    streams: Sequence[MegadocStream], mask: Mask, context_length: int
) -> SegmentBounds:
    """Upper bounds of the segments of one window.

    A window holds the most segments when it holds the shortest ones; two more may be cut by its
    borders. Packing ``whole`` cuts long documents at multiples of the context length, so what such
    cuts leave over counts among the shortest.
    """
    if mask is Mask.none:
        return SegmentBounds(1, context_length)
    most = longest = 1
    for stream in streams:
        by_member = mask is Mask.document and stream.manifest.members_are_documents
        lengths = stream.member_lengths if by_member else stream.lengths
        ends = lengths.cumsum(dtype=np.int64)
        sample_starts = stream.lengths.cumsum(dtype=np.int64) - stream.lengths
        sample = np.searchsorted(sample_starts, ends, side="left") - 1
        start = ends - lengths - sample_starts[sample]  # of the segment, in its sample
        end = ends - sample_starts[sample]
        before_cut = np.minimum(lengths, context_length - start % context_length)
        after_cut = np.minimum(lengths, (end - 1) % context_length + 1)
        pieces = np.sort(np.concatenate((before_cut, after_cut[before_cut < lengths])))
        shortest = int(np.searchsorted(pieces.cumsum(), context_length, side="right"))
        most = max(most, min(context_length, shortest + 2))
        longest = max(longest, min(context_length, int(lengths.max())))
    return SegmentBounds(most, longest)


def pack(
    windows: Sequence[Window],
    streams: Sequence[MegadocStream],
    mask: Mask,
    context_length: int,
    bounds: SegmentBounds,
) -> PackedBatch:
    """Read the documents of ``windows`` and put them on one token axis."""
    places = len(windows) * context_length
    input_ids = np.full(places, streams[0].manifest.eos_id, dtype=np.int64)
    targets = np.full(places, NO_TARGET, dtype=np.int64)
    target_documents = np.zeros(places, dtype=np.int64)
    target_positions = np.zeros(places, dtype=np.int64)
    borders = [0]
    place = 0
    for window in windows:
        stream = streams[window.source]
        for piece, (document, start, length) in enumerate(
            zip(window.documents, window.starts, window.lengths, strict=True)
        ):
            sample = stream[int(document)]
            end = start + length
            here = slice(place, place + length)
            input_ids[here] = sample.tokens[start:end]
            following = sample.tokens[start + 1 : end + 1]
            targets[place : place + len(following)] = following
            target_documents[here] = document
            target_positions[here] = np.arange(start + 1, end + 1)
            if mask is Mask.none:
                if piece and window.starts[piece] == 0:  # predicted by the document before it
                    targets[place - 1] = sample.tokens[0]
                    target_documents[place - 1] = document
                    target_positions[place - 1] = 0
            elif mask is Mask.document and stream.manifest.members_are_documents:
                ends = sample.member_ends
                cuts = place - start + ends[(ends > start) & (ends < end)]
                borders.extend(cuts.tolist())
                targets[cuts - 1] = NO_TARGET
                if end in ends:
                    targets[place + length - 1] = NO_TARGET
            place += int(length)
            if mask is not Mask.none:
                borders.append(place)
        if mask is Mask.none:
            borders.append(place)
    segments = len(windows) * bounds.most
    assert len(borders) - 1 <= segments, "segment_bounds() is wrong"
    lengths = np.diff(borders)
    positions = np.zeros(places, dtype=np.int64)
    positions[:place] = np.arange(place) - np.repeat(borders[:-1], lengths)
    borders.extend([place] * (segments + 1 - len(borders)))
    return PackedBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(targets),
        torch.from_numpy(positions),
        torch.tensor(borders, dtype=torch.int32),
        bounds.longest,
        torch.from_numpy(target_documents),
        torch.from_numpy(target_positions),
        place,
        int((targets != NO_TARGET).sum()),
    )


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
        self.bounds = segment_bounds(streams, mask, plan.context_length)
        self.waited = 0.0
        share = plan.batch_size // world_size
        self.micro_batch_size = micro_batch_size or share
        if plan.batch_size % world_size or share % self.micro_batch_size:
            raise ValueError(
                f"data.batch_size={plan.batch_size} windows cannot be divided among {world_size} "
                f"ranks in micro-batches of data.micro_batch_size={self.micro_batch_size}; make it "
                "a multiple of both"
            )

    def read(self, step: int) -> list[PackedBatch]:
        """This rank's micro-batches of one step."""
        windows = rank_windows(self.plan.windows(step), self.rank, self.world_size)
        return [
            pack(
                windows[first : first + self.micro_batch_size],
                self.streams,
                self.mask,
                self.plan.context_length,
                self.bounds,
            )
            for first in range(0, len(windows), self.micro_batch_size)
        ]

    def __iter__(self) -> Iterator[tuple[int, list[PackedBatch]]]:
        ready: queue.Queue[list[PackedBatch] | BaseException] = queue.Queue(PREFETCHED_STEPS)
        stopped = threading.Event()

        def offer(item: list[PackedBatch] | BaseException) -> None:
            while not stopped.is_set():
                with contextlib.suppress(queue.Full):
                    ready.put(item, timeout=0.1)
                    return

        def read_ahead() -> None:
            try:
                for step in self.steps:
                    if stopped.is_set():
                        return
                    offer(self.read(step))
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
