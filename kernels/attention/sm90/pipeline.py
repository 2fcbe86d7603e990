"""What the sm_90 kernels share: the walk over tiles, rings in shared memory, parts of a head.

A head dimension is a power of two or the sum of two (96 = 64 + 32). Whatever has it as a dimension
is a tuple with an entry a part: descriptors, tiles in shared memory, operands in registers, sums.
Each part is a product of its own and none is padded; kernels get the sizes as ``D0`` and ``D1``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tile_config import split
from ..tile_scheduler import FIELDS
from .gluon_compat import (
    TensorDescriptor,
    gl,
    gluon,
    mbarrier,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)

RAGGED = 1 << 30  # rows of a ragged descriptor; those that exist are its last ones
WRAP = 1 << 34  # elements: that often as many as RAGGED says, and an address is back where it was
CONSUMER_REGISTERS = 240
PRODUCER_REGISTERS = 24


class Ring(NamedTuple):
    """Stages of shared memory that the producer fills and the consumers free.

    Each part of ``tile`` is ``[STAGES, ..., Di]``; ``full`` and ``empty`` are a barrier a stage.
    """

    tile: Any
    full: Any
    empty: Any


class Walk(NamedTuple):
    """A table of tiles, how many of them hold tokens, and the heads that each stands for."""

    tiles: Any
    count: Any
    heads: Any


@gluon.jit
def walk_over(tiles, capacity, heads, FIELDS: gl.constexpr):
    """The walk over a table; its last row says how many tiles hold tokens."""
    return Walk(tiles, gl.load(tiles + (capacity - 1) * FIELDS), heads)


@gluon.jit
def turns_of(walk):
    programs = gl.num_programs(0)
    return (walk.count * walk.heads + programs - 1) // programs


@gluon.jit
def tile_of(walk, turn, FIELDS: gl.constexpr):
    """The head and the tile of this program in its ``turn``: (head, *the fields of the tile).

    Items are dealt to and fro, so that a program that got a long tile in one turn gets a short one
    in the next. Where there is no item the count is 0.
    """
    programs = gl.num_programs(0)
    program = gl.program_id(0)
    item = turn * programs + program + (turn % 2) * (programs - 1 - 2 * program)
    exists = item < walk.count * walk.heads
    # Programs without an item read the last one; the address stays valid.
    item = gl.minimum(item, walk.count * walk.heads - 1)
    row = walk.tiles + (item // walk.heads) * FIELDS
    count = gl.where(exists, gl.load(row + 1), 0)
    start, diagonal, length = gl.load(row + 2), gl.load(row + 3), gl.load(row + 4)
    return item % walk.heads, gl.load(row), count, start, diagonal, length


@gluon.jit
def pair(first, second, D1: gl.constexpr):
    """The tuple of the parts; of a head dimension of one part ``second`` does not count."""
    return (first, second) if D1 > 0 else (first,)


@gluon.jit
def entry(tile, i):
    """Entry ``i`` of every part."""
    return (tile[0].index(i), tile[1].index(i)) if len(tile) > 1 else (tile[0].index(i),)


@gluon.jit
def matrix(tile, ROWS: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr):
    """What a ragged descriptor has copied, each part as ``[ROWS, Di]``."""
    first = tile[0].reshape([ROWS, D0])
    return (first, tile[1].reshape([ROWS, D1])) if D1 > 0 else (first,)


@gluon.jit
def barriers(COUNT: gl.constexpr, CONSUMERS: gl.constexpr):
    """Full barriers, which wait for bytes, and empty ones, which wait for all consumers."""
    full = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    return full, empty


@gluon.jit
def make_ring(
    descs, ROWS: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
):  # fmt: skip
    """An empty ring of blocks ``[1, 1, ROWS, Di]`` of ragged descriptors."""
    kind: gl.constexpr = descs[0].dtype
    tile = gl.allocate_shared_memory(kind, [STAGES, 1, 1, ROWS, D0], descs[0].layout)
    rest = tile
    if D1 > 0:
        rest = gl.allocate_shared_memory(kind, [STAGES, 1, 1, ROWS, D1], descs[1].layout)
    full, empty = barriers(STAGES, CONSUMERS)
    return Ring(pair(tile, rest, D1), full, empty)


@gluon.jit
def expect(barrier, descs, BLOCKS: gl.constexpr):
    """Announce ``BLOCKS`` blocks of all parts."""
    size: gl.constexpr = descs[0].block_type.nbytes
    rest: gl.constexpr = descs[len(descs) - 1].block_type.nbytes if len(descs) > 1 else 0
    mbarrier.expect(barrier, BLOCKS * (size + rest))


@gluon.jit
def load_rows(
    descs, row, end, column, barrier, tile, D0: gl.constexpr, RAGGED: gl.constexpr
):  # fmt: skip
    """Copy a block of rows from ``row`` on; those from ``end`` on arrive as zeros."""
    place = [RAGGED, end, RAGGED - end + row, column]
    tma_load(descs[0], place, barrier, tile[0])
    if len(descs) > 1:
        tma_load(descs[1], [RAGGED, end, RAGGED - end + row, column + D0], barrier, tile[1])


@gluon.jit
def fill(
    ring, descs, turn, row, end, column, D0: gl.constexpr, STAGES: gl.constexpr,
    RAGGED: gl.constexpr,
):  # fmt: skip
    """Copy a block into the ring's next stage, once that is free."""
    stage = turn % STAGES
    mbarrier.wait(ring.empty.index(stage), ((turn // STAGES) & 1) ^ 1)
    full = ring.full.index(stage)
    expect(full, descs, 1)
    load_rows(descs, row, end, column, full, entry(ring.tile, stage), D0, RAGGED)


@gluon.jit
def key_steps(end, BLOCK_N: gl.constexpr):
    """Steps up to ``end``; at least one, so that rows that see nothing are written too."""
    return (gl.maximum(end, 1) + BLOCK_N - 1) // BLOCK_N


@gluon.jit
def produce_keys(
    q_descs, dout_descs, k_descs, v_descs, q, dout, k, v, walk, WITH_DOUT: gl.constexpr,
    GROUP: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, FIELDS: gl.constexpr, RAGGED: gl.constexpr,
):  # fmt: skip
    """Copy every tile's halves of Q, and of dO where it is wanted, then its K and V from the
    diagonal backwards."""
    filled = 0  # steps copied so far
    done = 0  # query tiles so far
    for turn in range(turns_of(walk)):
        head, first, count, k_start, diagonal, _length = tile_of(walk, turn, FIELDS)
        if count > 0:
            column = head * (D0 + D1)
            mbarrier.wait(q.empty.index(0), (done & 1) ^ 1)
            full = q.full.index(0)
            expect(full, q_descs, 4 if WITH_DOUT else 2)
            for half in gl.static_range(2):
                row, end = first + 64 * half, first + count
                load_rows(q_descs, row, end, column, full, entry(q.tile, half), D0, RAGGED)
                if WITH_DOUT:
                    tile = entry(dout.tile, half)
                    load_rows(dout_descs, row, end, column, full, tile, D0, RAGGED)
            column = head // GROUP * (D0 + D1)
            end = k_start + gl.maximum(diagonal + count, 0)
            steps = key_steps(diagonal + count, BLOCK_N)
            for i in range(steps):
                row = k_start + (steps - 1 - i) * BLOCK_N
                fill(k, k_descs, filled + i, row, end, column, D0, STAGES, RAGGED)
                fill(v, v_descs, filled + i, row, end, column, D0, STAGES, RAGGED)
            filled += steps
            done += 1


@gluon.jit
def product(a, b, c, ADD: gl.constexpr):
    """Issue ``a @ b.T``, added to c or not, over the whole head dimension: a product a part."""
    c = warpgroup_mma(a[0], b[0].permute((1, 0)), c, use_acc=ADD, is_async=True)
    if len(a) > 1:
        c = warpgroup_mma(a[1], b[1].permute((1, 0)), c, is_async=True)
    return c


@gluon.jit
def accumulate(a, b, sums):
    """Issue ``sums += a @ b``, a product a part."""
    first = warpgroup_mma(a[0], b[0], sums[0], is_async=True)
    return (first, warpgroup_mma(a[1], b[1], sums[1], is_async=True)) if len(b) > 1 else (first,)


@gluon.jit
def finish(OUTSTANDING: gl.constexpr, sums, operands):
    """Wait until at most ``OUTSTANDING`` products run; the operands' registers are read until
    theirs are finished: hence a dependency."""
    done = warpgroup_mma_wait(OUTSTANDING, deps=sums + operands)
    return done[: len(sums)], done[len(sums) :]


@gluon.constexpr_function
def sums_layout(width, warps):
    """Of ``[16 * warps, width]`` fp32 that products are summed in."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, width, 16])


@gluon.jit
def zeros(ROWS: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, WARPS: gl.constexpr):
    """fp32 sums ``[ROWS, Di]``."""
    first = gl.zeros([ROWS, D0], gl.float32, layout=sums_layout(D0, WARPS))
    rest = first
    if D1 > 0:
        rest = gl.zeros([ROWS, D1], gl.float32, layout=sums_layout(D1, WARPS))
    return pair(first, rest, D1)


@gluon.jit
def operands(x, D0: gl.constexpr, D1: gl.constexpr, WARPS: gl.constexpr):
    """x in the registers of the left operand of the products of :func:`accumulate`."""
    first = gl.convert_layout(x, gl.DotOperandLayout(0, sums_layout(D0, WARPS), 2))
    rest = first
    if D1 > 0:
        rest = gl.convert_layout(x, gl.DotOperandLayout(0, sums_layout(D1, WARPS), 2))
    return pair(first, rest, D1)


@gluon.jit
def scaled(sums, factor, D0: gl.constexpr, D1: gl.constexpr, WARPS: gl.constexpr):
    """Each row of the sums times its factor."""
    first = sums[0] * gl.convert_layout(factor, gl.SliceLayout(1, sums_layout(D0, WARPS)))[:, None]
    rest = first
    if D1 > 0:
        layout: gl.constexpr = gl.SliceLayout(1, sums_layout(D1, WARPS))
        rest = sums[1] * gl.convert_layout(factor, layout)[:, None]
    return pair(first, rest, D1)


@gluon.jit
def times(sums, factor):
    """All of the sums times one factor."""
    return (sums[0] * factor, sums[1] * factor) if len(sums) > 1 else (sums[0] * factor,)


@gluon.constexpr_function
def rows_layout(width, warps):
    """Of ``[ROWS, width]`` read from or written to memory, 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // width, width // 8], [warps, 1], [1, 0])


@gluon.jit
def store_part(
    base, first, count, stride, values, ROWS: gl.constexpr, D: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """Write the first ``count`` of ``values [ROWS, D]`` from row ``first`` on."""
    layout: gl.constexpr = rows_layout(D, WARPS)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    place = (first + rows).to(gl.int64)[:, None] * stride + columns[None, :]
    values = gl.convert_layout(values.to(base.dtype.element_ty), layout)
    gl.store(base + place, values, mask=(rows < count)[:, None])


@gluon.jit
def store_rows(
    base, first, count, head, heads, sums, ROWS: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Write the first ``count`` rows of the sums as those of ``head`` in ``[T, heads, D]``."""
    base += head * (D0 + D1)
    store_part(base, first, count, heads * (D0 + D1), sums[0], ROWS, D0, WARPS)
    if D1 > 0:
        store_part(base + D0, first, count, heads * (D0 + D1), sums[1], ROWS, D1, WARPS)


def with_adjacent_heads(x: Tensor) -> Tensor:
    """x itself if its heads lie side by side and TMA can address its rows, else a copy."""
    # An expanded tensor has a stride of 0, which TMA does not take.
    fits = x.stride(1) == x.shape[2] and x.data_ptr() % 16 == 0
    fits = fits and x.stride(0) > 0 and x.stride(0) % 8 == 0
    return x if fits else x.contiguous()


def descriptors(x: Tensor, rows: int) -> tuple[Any, Any]:
    """Blocks of ``rows`` tokens and of each part of one head of ``[T, H, Dh]``.

    A part that the head dimension does not have is described as the first; nobody reads it. Rows
    from a position on that is named in each load arrive as zeros: it is where the rows of the third
    dimension end, and the bounds of that dimension are checked in hardware; the first two
    dimensions move the address there, by wrapping around 2^64.
    """
    _, heads, size = x.shape
    stride = x.stride(0)
    shape = [0x7FFF0000, 0x7FFF0000, RAGGED, heads * size]
    strides = [WRAP - stride, stride, stride, 1]
    kinds = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}

    def block_of(width: int) -> Any:
        block = [1, 1, rows, width]
        layout = gl.NVMMASharedLayout.get_default_for(block, kinds[x.dtype])
        return TensorDescriptor(x, shape, strides, block, layout)

    first, rest = split(size).values()
    return block_of(first), block_of(rest or first)


def sizes(size: int) -> dict[str, int]:
    """The constants that all kernels have, for a head dimension."""
    return {
        **split(size),
        "FIELDS": FIELDS,
        "RAGGED": RAGGED,
        "PRODUCER_REGISTERS": PRODUCER_REGISTERS,
    }
