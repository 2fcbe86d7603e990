"""Packed batches against a naive construction, for every mask."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kernels.attention.tile_config import TileConfig
from kernels.attention.tile_scheduler import make_tiles
from tests.trainer.conftest import StreamMaker
from trainer.config.schema import Mask
from trainer.data.batches import (
    NO_TARGET,
    BatchLoader,
    PackedBatch,
    collate,
)
from trainer.data.mds import MegadocStream
from trainer.data.packing import Window, pack_whole
from trainer.data.plan import Plan, Source
from trainer.data.random_stream import RandomStream

CONTEXT = 24
NAMES = itertools.count()


def plan_of(streams: list[MegadocStream], packing: str, batch: int = 4) -> Plan:
    sources = [Source(s.manifest.name, s.lengths, 1 / len(streams)) for s in streams]
    return Plan(sources, CONTEXT, batch, packing, seed=3)


def naive(
    windows: list[Window], streams: list[MegadocStream], mask: Mask
) -> list[tuple[list[int], list[int]]]:
    """Segments as (tokens, targets), token by token."""
    segments: list[tuple[list[int], list[int]]] = []
    for window in windows:
        stream = streams[window.source]
        rows = []  # (token, document, place, segment key)
        for document, start, length in zip(
            window.documents, window.starts, window.lengths, strict=True
        ):
            sample = stream[int(document)]
            for place in range(start, start + length):
                member = int(np.searchsorted(sample.member_ends, place, side="right"))
                if mask is Mask.none:
                    key: tuple[int, ...] = ()
                elif mask is Mask.document and stream.manifest.members_are_documents:
                    key = (int(document), member)
                else:
                    key = (int(document),)
                rows.append((int(document), place, key))
        for index, (document, place, key) in enumerate(rows):
            sample = stream[document]
            if index == 0 or rows[index - 1][2] != key or len(segments) == 0:
                segments.append(([], []))
            following = rows[index + 1] if index + 1 < len(rows) else None
            target = NO_TARGET
            if place + 1 < len(sample.tokens):
                ends = sample.member_ends
                cut = mask is Mask.document and stream.manifest.members_are_documents
                if not (cut and place + 1 in ends):
                    target = int(sample.tokens[place + 1])
            elif mask is Mask.none and following is not None and following[1] == 0:
                target = int(stream[following[0]].tokens[0])
            segments[-1][0].append(int(sample.tokens[place]))
            segments[-1][1].append(target)
    return segments


def unpack(batch: PackedBatch) -> list[tuple[list[int], list[int]]]:
    borders = batch.cu_seqlens.tolist()
    return [
        (batch.input_ids[start:end].tolist(), batch.targets[start:end].tolist())
        for start, end in itertools.pairwise(borders)
        if end > start
    ]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example(members=[[25]] * 12, packing="whole", one_text=False)  # a window full of remainders
@example(members=[[20, 5], [25]] * 6, packing="whole", one_text=False)
@given(
    members=st.lists(st.lists(st.integers(2, 20), min_size=1, max_size=4), min_size=2, max_size=12),
    packing=st.sampled_from(["whole", "stream", "windows"]),
    one_text=st.booleans(),
)
def test_batches_equal_the_naive_construction(
    make_stream: StreamMaker, members: list[list[int]], packing: str, one_text: bool
) -> None:
    stream = make_stream(f"stream-{next(NAMES)}", members, members_are_documents=not one_text)
    plan = plan_of([stream], packing)
    for mask in Mask:
        for step in range(4):
            windows = plan.windows(step)
            batch = collate(windows, [stream], mask, CONTEXT)
            assert unpack(batch) == naive(windows, [stream], mask)
            used = len(unpack(batch))
            handed = len(batch.cu_seqlens) - 1
            assert used <= handed <= (4 if mask is Mask.none else 2 * used - 1 or 1)
            assert batch.tokens == batch.cu_seqlens[-1] == sum(w.tokens for w in windows)
            assert (batch.targets[batch.tokens :] == NO_TARGET).all()
            assert batch.cu_seqlens.diff().max() <= batch.max_seqlen <= CONTEXT
            assert batch.valid_targets == (batch.targets != NO_TARGET).sum()
            for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
                assert torch.equal(batch.positions[start:end], torch.arange(end - start))


def test_streams_that_share_a_batch_keep_their_tokens(make_stream: StreamMaker) -> None:
    streams = [
        make_stream("real", [[n % 17 + 3] for n in range(40)]),
        make_stream("stitched-g2", [[n % 5 + 3, 2, n % 23 + 9] for n in range(40)], shift=7),
        make_stream("latent-g2", [[4, 70, 2]] * 4, members_are_documents=False),
    ]
    for packing, mask in itertools.product(("whole", "stream", "windows"), Mask):
        plan = plan_of(streams, packing, batch=8)
        windows = plan.windows(1)
        assert len({window.source for window in windows}) == 3
        assert unpack(collate(windows, streams, mask, CONTEXT)) == naive(windows, streams, mask)


@pytest.mark.parametrize(("context", "windows"), [(4096, 16), (32_768, 2), (131_072, 1)])
def test_attention_is_handed_at_most_twice_what_is_used(context: int, windows: int) -> None:
    """100,000 documents of lognormal length, one micro-batch in fifty of an epoch."""
    drawn = np.random.default_rng(0).lognormal(np.log(700), 1.2, 100_000)
    stream = RandomStream(np.maximum(1, drawn), 97)
    packed = pack_whole(stream.lengths, context, np.random.default_rng(0))
    shapes, handed, used, tiles, used_tiles = set(), 0, 0, 0, 0
    config = TileConfig(128, 64, *[64, 8, 2] * 3)
    for first in range(0, len(packed.offsets) - windows, 50 * windows):
        chosen = [packed.window(0, first + index) for index in range(windows)]
        batch = collate(chosen, [stream], Mask.megadoc, context)
        borders, lengths = batch.cu_seqlens, batch.cu_seqlens.diff()
        assert lengths.max() <= batch.max_seqlen <= 2 * lengths.max()
        shapes.add((len(lengths), batch.max_seqlen))
        handed += len(lengths)
        used += int((lengths > 0).sum())
        assert len(lengths) < 2 * (lengths > 0).sum()
        places = len(batch.targets)
        rows, columns, _ = make_tiles(borders, borders, places, places, config)
        for table in (rows, columns):
            tiles += len(table) - 1
            used_tiles += int(table[-1, 0])
            assert table[-1, 0] == (table[:, 1] > 0).sum()
    assert used < handed < 2 * used
    assert used_tiles < tiles < 1.2 * used_tiles
    for sizes in zip(*shapes, strict=True):
        assert len(set(sizes)) <= 8
        assert all(size & (size - 1) == 0 for size in sizes)


def test_every_token_of_a_long_document_is_a_target_once(make_stream: StreamMaker) -> None:
    stream = make_stream("real", [[100]])
    plan = plan_of([stream], "whole", batch=5)
    batch = collate(plan.windows(0), [stream], Mask.megadoc, CONTEXT)
    valid = batch.targets != NO_TARGET
    places = sorted(batch.target_positions[valid].tolist())
    assert places == list(range(1, 100))


def loader(
    streams: list[MegadocStream], rank: int, world_size: int, micro: int | None, start: int = 0
) -> BatchLoader:
    return BatchLoader(
        plan_of(streams, "whole", batch=8),
        streams,
        Mask.document,
        rank=rank,
        world_size=world_size,
        micro_batch_size=micro,
        start_step=start,
        stop_step=6,
    )


def test_ranks_and_micro_batches_see_the_same_global_batch(make_stream: StreamMaker) -> None:
    streams = [
        make_stream("real", [[n % 17 + 3] for n in range(40)]),
        make_stream("simple-g1", [[n % 11 + 3, 5] for n in range(40)]),
    ]

    def segments(world_size: int, micro: int | None) -> list[list[tuple[list[int], list[int]]]]:
        steps: list[list[tuple[list[int], list[int]]]] = [[] for _ in range(6)]
        for rank in range(world_size):
            for step, batches in loader(streams, rank, world_size, micro):
                for batch in batches:
                    steps[step].extend(unpack(batch))
        return steps

    whole = segments(1, None)
    for world_size, micro in ((1, 2), (2, None), (4, 1), (8, 1)):
        assert segments(world_size, micro) == whole
    resumed = [unpack(b) for _, batches in loader(streams, 0, 1, None, start=4) for b in batches]
    assert resumed == whole[4:]


def test_a_batch_that_cannot_be_divided_is_refused(make_stream: StreamMaker) -> None:
    streams = [make_stream("real", [[9]] * 20)]
    for world_size, micro in ((3, None), (2, 3)):
        with pytest.raises(ValueError, match="cannot be divided"):
            loader(streams, 0, world_size, micro)


def test_a_broken_shard_surfaces_where_the_batch_is_wanted(make_stream: StreamMaker) -> None:
    stream = make_stream("real", [[9]] * 20, vocab_size=10)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        list(loader([stream], 0, 1, None))
