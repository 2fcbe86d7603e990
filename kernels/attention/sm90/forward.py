"""Forward attention for sm_90 in Gluon: one producer warp, two consumer warpgroups.

A persistent kernel over the row tiles of ``tile_scheduler``. The producer warp copies Q, K and V
tiles to shared memory with TMA; each consumer warpgroup owns 64 query rows and runs

    issue S(i) = Q K(i)^T;  issue O += P(i-1) V(i-1);  wait S(i);  softmax S(i);  wait O

so that the tensor cores work on a product while the softmax of other scores is computed
(FlashAttention-3, 2407.08608, section 3.2). Key tiles are visited from the diagonal backwards;
only those that the diagonal crosses are masked. V is read through a ragged descriptor: rows behind
the last visible key arrive as zeros, so what other segments hold never meets a product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tile_scheduler import FIELDS
from .gluon_compat import (
    TensorDescriptor,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)

BLOCK_M = 128  # queries a tile: two warpgroups of 64
BLOCK_N = 128  # keys a tile
STAGES = {64: 3, 128: 2}  # tiles of K and of V in shared memory
CONSUMER_REGISTERS = 240
PRODUCER_REGISTERS = 24
RAGGED = 1 << 30  # rows of a ragged descriptor; a segment's rows are its last ones
WRAP = 1 << 34  # elements: that often as many as RAGGED says, and an address is back where it was


@gluon.jit
def tile_of(tiles, tile_count, heads, turn, FIELDS: gl.constexpr):
    """The head and the tile of this program in its ``turn``: (head, *the fields of the tile).

    Items are dealt to and fro, so that a program that got a long tile in one turn gets a short one
    in the next. Where there is no item the count is 0.
    """
    programs = gl.num_programs(0)
    program = gl.program_id(0)
    item = turn * programs + program + (turn % 2) * (programs - 1 - 2 * program)
    exists = item < tile_count * heads
    # Programs without an item read the last one; the address stays valid.
    item = gl.minimum(item, tile_count * heads - 1)
    row = tiles + (item // heads) * FIELDS
    count = gl.where(exists, gl.load(row + 1), 0)
    start, diagonal, length = gl.load(row + 2), gl.load(row + 3), gl.load(row + 4)
    return item % heads, gl.load(row), count, start, diagonal, length


@gluon.jit
def used_tiles(tiles, tile_count, FIELDS: gl.constexpr):
    """How many of the table's tiles hold tokens; its last row says so."""
    return gl.load(tiles + (tile_count - 1) * FIELDS)


@gluon.jit
def turns_of(tile_count, heads):
    programs = gl.num_programs(0)
    return (tile_count * heads + programs - 1) // programs


@gluon.jit
def key_tiles_of(end, BLOCK_N: gl.constexpr):
    """Key tiles up to ``end``; at least one, so that rows that see nothing are written too."""
    return (gl.maximum(end, 1) + BLOCK_N - 1) // BLOCK_N


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, q_tile, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full,
    v_empty, tiles, tile_count, heads, GROUP: gl.constexpr, D: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, FIELDS: gl.constexpr, RAGGED: gl.constexpr,
):  # fmt: skip
    """Copy every tile's Q halves, then its K and V tiles from the diagonal backwards."""
    filled = 0  # K tiles, and V tiles, copied so far
    done = 0  # query tiles so far
    tile_count = used_tiles(tiles, tile_count, FIELDS)
    for turn in range(turns_of(tile_count, heads)):
        head, first, count, k_start, diagonal, _length = tile_of(
            tiles, tile_count, heads, turn, FIELDS
        )
        if count > 0:
            column = head // GROUP * D
            end = gl.maximum(diagonal + count, 0)
            mbarrier.wait(q_empty, (done & 1) ^ 1)
            mbarrier.expect(q_full, 2 * q_desc.block_type.nbytes)
            tma_load(q_desc, [first, head * D], q_full, q_tile.index(0))
            tma_load(q_desc, [first + 64, head * D], q_full, q_tile.index(1))
            key_tiles = key_tiles_of(end, BLOCK_N)
            for i in range(key_tiles):
                row = (key_tiles - 1 - i) * BLOCK_N
                stage = (filled + i) % STAGES
                free = (((filled + i) // STAGES) & 1) ^ 1
                mbarrier.wait(k_empty.index(stage), free)
                mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
                tma_load(k_desc, [k_start + row, column], k_full.index(stage), k_ring.index(stage))
                mbarrier.wait(v_empty.index(stage), free)
                mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
                place = [RAGGED, k_start + end, RAGGED - end + row, column]
                tma_load(v_desc, place, v_full.index(stage), v_ring.index(stage))
            filled += key_tiles
            done += 1


@gluon.jit
def softmax_step(
    scores, row_max, row_sum, limit, first_key, scale_log2, SCORES: gl.constexpr,
    BLOCK_N: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax in base 2.

    Args:
        scores: fp32 ``[64, BLOCK_N]``, not yet scaled.
        row_max: fp32 ``[64]``, maximum so far of the scaled scores.
        row_sum: fp32 ``[64]``.
        limit: int32 ``[64]``, the last key that each row sees.

    Returns:
        weights fp32 ``[64, BLOCK_N]``, row_max, row_sum, and the factor of what was summed before.
    """
    if MASKED:
        keys = first_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
        scores = gl.where(keys[None, :] <= limit[:, None], scores, float("-inf"))
    highest = gl.maximum(row_max, gl.max(scores, 1) * scale_log2)
    anchor = highest
    if MASKED:  # a row that has seen no key yet: exp2(-inf - -inf) would be NaN
        anchor = gl.where(highest == float("-inf"), 0.0, highest)
    weights = gl.exp2(scores * scale_log2 - anchor[:, None])
    rescale = gl.exp2(row_max - anchor)
    return weights, highest, row_sum * rescale + gl.sum(weights, 1), rescale


@gluon.jit
def attend_step(
    q, k_ring, v_ring, k_full, k_empty, v_full, v_empty, output, weights, row_max, row_sum, limit,
    first_key, step, scale_log2, SCORES: gl.constexpr, WEIGHTS: gl.constexpr,
    OUTPUT: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Scores of ring entry ``step`` while the weights of entry ``step - 1`` are applied to V."""
    stage = step % STAGES
    before = (step - 1) % STAGES
    blank = gl.zeros([64, BLOCK_N], gl.float32, layout=SCORES)
    mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
    scores = warpgroup_mma(
        q, k_ring.index(stage).permute((1, 0)), blank, use_acc=False, is_async=True
    )
    mbarrier.wait(v_full.index(before), ((step - 1) // STAGES) & 1)
    values = v_ring.index(before).reshape([BLOCK_N, D])
    output = warpgroup_mma(weights, values, output, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_empty.index(stage))
    exponentials, row_max, row_sum, rescale = softmax_step(
        scores, row_max, row_sum, limit, first_key, scale_log2, SCORES, BLOCK_N, MASKED
    )
    # The registers of `weights` are read until the product is finished: hence a dependency.
    output, weights = warpgroup_mma_wait(0, deps=[output, weights])
    mbarrier.arrive(v_empty.index(before))
    rescale = gl.convert_layout(rescale, gl.SliceLayout(1, OUTPUT))
    weights = gl.convert_layout(exponentials.to(weights.dtype), WEIGHTS)
    return output * rescale[:, None], weights, row_max, row_sum


@gluon.jit
def consume(
    q_tile, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty, out, lse, tiles,
    tile_count, heads, tokens, scale_log2, HALF: gl.constexpr, D: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, FIELDS: gl.constexpr,
):  # fmt: skip
    """Attention of 64 rows of every tile of this program; the rest is the other consumer's."""
    DTYPE: gl.constexpr = q_tile.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTPUT, k_width=2)
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    q = q_tile.index(HALF)  # [64, D]
    step = 0  # ring entries consumed so far
    done = 0  # query tiles so far
    tile_count = used_tiles(tiles, tile_count, FIELDS)
    for turn in range(turns_of(tile_count, heads)):
        head, first, count, _k_start, diagonal, _length = tile_of(
            tiles, tile_count, heads, turn, FIELDS
        )
        if count > 0:
            key_tiles = key_tiles_of(diagonal + count, BLOCK_N)
            rows = HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
            limit = diagonal + rows
            # Tiles whose last key the first row sees need no mask.
            seen_by_all = gl.maximum(diagonal + HALF * 64 + 1, 0) // BLOCK_N
            plain = gl.minimum(seen_by_all, key_tiles - 1)
            row_max = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
            row_sum = gl.zeros([64], gl.float32, layout=gl.SliceLayout(1, SCORES))
            blank = gl.zeros([64, BLOCK_N], gl.float32, layout=SCORES)
            output = gl.zeros([64, D], gl.float32, layout=OUTPUT)

            mbarrier.wait(q_full, done & 1)
            mbarrier.wait(k_full.index(step % STAGES), (step // STAGES) & 1)
            scores = warpgroup_mma(
                q, k_ring.index(step % STAGES).permute((1, 0)), blank, use_acc=False, is_async=True
            )
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(k_empty.index(step % STAGES))
            exponentials, row_max, row_sum, _ = softmax_step(
                scores, row_max, row_sum, limit, (key_tiles - 1) * BLOCK_N, scale_log2,
                SCORES, BLOCK_N, True,
            )  # fmt: skip
            weights = gl.convert_layout(exponentials.to(DTYPE), WEIGHTS)
            for i in range(1, key_tiles - plain):
                output, weights, row_max, row_sum = attend_step(
                    q, k_ring, v_ring, k_full, k_empty, v_full, v_empty, output, weights, row_max,
                    row_sum, limit, (key_tiles - 1 - i) * BLOCK_N, step + i, scale_log2,
                    SCORES, WEIGHTS, OUTPUT, D, BLOCK_N, STAGES, True,
                )  # fmt: skip
            for i in range(key_tiles - plain, key_tiles):
                output, weights, row_max, row_sum = attend_step(
                    q, k_ring, v_ring, k_full, k_empty, v_full, v_empty, output, weights, row_max,
                    row_sum, limit, (key_tiles - 1 - i) * BLOCK_N, step + i, scale_log2,
                    SCORES, WEIGHTS, OUTPUT, D, BLOCK_N, STAGES, False,
                )  # fmt: skip
            mbarrier.arrive(q_empty)
            step += key_tiles
            last = (step - 1) % STAGES
            mbarrier.wait(v_full.index(last), ((step - 1) // STAGES) & 1)
            values = v_ring.index(last).reshape([BLOCK_N, D])
            output = warpgroup_mma(weights, values, output, is_async=True)
            output, weights = warpgroup_mma_wait(0, deps=[output, weights])
            mbarrier.arrive(v_empty.index(last))
            done += 1

            seen = row_sum > 0
            factor = gl.where(seen, 1.0 / gl.where(seen, row_sum, 1.0), 0.0)
            factor = gl.convert_layout(factor, gl.SliceLayout(1, OUTPUT))
            # Natural logarithm from the base-2 sums: ln 2 = 0.6931...
            row_lse = (row_max + gl.log2(gl.where(seen, row_sum, 1.0))) * 0.6931471805599453
            gl.store(lse + head.to(gl.int64) * tokens + first + rows, row_lse, mask=rows < count)
            values = gl.convert_layout((output * factor[:, None]).to(DTYPE), STORE)
            store_rows = HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, STORE))
            columns = head * D + gl.arange(0, D, layout=gl.SliceLayout(0, STORE))
            place = (first + store_rows).to(gl.int64)[:, None] * (heads * D) + columns[None, :]
            gl.store(out + place, values, mask=(store_rows < count)[:, None])


@gluon.jit
def barriers(COUNT: gl.constexpr, CONSUMERS: gl.constexpr):
    """A ring's full barriers, which wait for bytes, and its empty ones, for all consumers."""
    full = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    return full, empty


@gluon.jit(do_not_specialize=["tile_count", "tokens"])
def forward_sm90_kernel(
    q_desc, k_desc, v_desc, out, lse, tiles, tile_count, heads, tokens, scale_log2,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    FIELDS: gl.constexpr, RAGGED: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Barriers and buffers; the work is in ``produce`` and ``consume``."""
    DTYPE: gl.constexpr = q_desc.dtype
    q_tile = gl.allocate_shared_memory(DTYPE, [2, 64, D], q_desc.layout)
    k_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, D], v_desc.layout)
    full, empty = barriers(1, 2)
    q_full, q_empty = full.index(0), empty.index(0)
    k_full, k_empty = barriers(STAGES, 2)
    v_full, v_empty = barriers(STAGES, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (q_tile, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                       out, lse, tiles, tile_count, heads, tokens, scale_log2, 0, D, BLOCK_N,
                       STAGES, FIELDS)),
            (consume, (q_tile, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                       out, lse, tiles, tile_count, heads, tokens, scale_log2, 1, D, BLOCK_N,
                       STAGES, FIELDS)),
            (produce, (q_desc, k_desc, v_desc, q_tile, k_ring, v_ring, q_full, q_empty, k_full,
                       k_empty, v_full, v_empty, tiles, tile_count, heads, GROUP, D, BLOCK_N,
                       STAGES, FIELDS, RAGGED)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def attention_forward_sm90(
    q: Tensor, k: Tensor, v: Tensor, row_tiles: Tensor, scale: float, programs: int
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of causal attention inside each segment.

    Args:
        q: ``[Tq, Hq, Dh]``, bfloat16 or float16, ``Dh`` 64 or 128, last dimension contiguous.
        k: ``[Tk, Hkv, Dh]``.
        v: ``[Tk, Hkv, Dh]``.
        row_tiles: ``Tiles.rows`` made with 128 rows.
        scale: factor of the scores, positive.
        programs: programs to run, the GPU's multiprocessors.

    Returns:
        ``[Tq, Hq, Dh]`` in q's dtype and fp32 ``[Hq, Tq]``; 0 and -inf where a query sees no key.
    """
    tokens, heads, size = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    q, k, v = (with_adjacent_heads(x) for x in (q, k, v))
    forward_sm90_kernel[(programs,)](
        descriptor(q, 64),
        descriptor(k, BLOCK_N),
        ragged_descriptor(v, BLOCK_N),
        out,
        lse,
        row_tiles,
        len(row_tiles),
        heads,
        tokens,
        scale * 1.4426950408889634,
        GROUP=heads // k.shape[1],
        D=size,
        BLOCK_N=BLOCK_N,
        STAGES=STAGES[size],
        FIELDS=FIELDS,
        RAGGED=RAGGED,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out, lse


def with_adjacent_heads(x: Tensor) -> Tensor:
    """x itself if its heads lie side by side and TMA can address its rows, else a copy."""
    # An expanded tensor has a stride of 0, which TMA does not take.
    fits = x.stride(1) == x.shape[2] and x.data_ptr() % 16 == 0
    fits = fits and x.stride(0) > 0 and x.stride(0) % 8 == 0
    return x if fits else x.contiguous()


def descriptor(x: Tensor, rows: int) -> Any:
    """Tiles of ``rows`` tokens and one head of ``[T, H, Dh]`` seen as ``[T, H * Dh]``."""
    tokens, heads, size = x.shape
    layout = shared_layout([rows, size], x.dtype)
    return TensorDescriptor(x, [tokens, heads * size], [x.stride(0), 1], [rows, size], layout)


def ragged_descriptor(x: Tensor, rows: int) -> Any:
    """Like :func:`descriptor`, but rows behind a position named in each load arrive as zeros.

    The position is where the rows of the third dimension end, and the bounds of that dimension are
    checked in hardware; the first two dimensions move the address there, by wrapping around 2^64.
    """
    _, heads, size = x.shape
    stride = x.stride(0)
    shape = [0x7FFF0000, 0x7FFF0000, RAGGED, heads * size]
    strides = [WRAP - stride, stride, stride, 1]
    block = [1, 1, rows, size]
    return TensorDescriptor(x, shape, strides, block, shared_layout(block, x.dtype))


def shared_layout(block: list[int], dtype: torch.dtype) -> Any:
    kinds = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
    return gl.NVMMASharedLayout.get_default_for(block, kinds[dtype])
