"""dK and dV for sm_90 in Gluon: one producer warp, two consumer warpgroups of 64 keys each.

A persistent kernel over the column tiles of ``tile_scheduler``. K and V of a tile stay in shared
memory while Q and dO of all query heads of the group stream by; scores are computed transposed, so
that P and dS are operands in registers (FlashAttention-3, 2407.08608):

    issue S' = K Q^T;  issue dP' = V dO^T;  wait S';  P';  issue dV += P' dO;  wait dP';  dS';
    issue dK += dS' Q

dK and dV are written once: no atomics, no fp32 scratch, bitwise the same in every run. Q and dO are
read through ragged descriptors: rows behind the segment arrive as zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tile_scheduler import FIELDS
from .forward import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    RAGGED,
    barriers,
    descriptor,
    ragged_descriptor,
    tile_of,
    turns_of,
    used_tiles,
    with_adjacent_heads,
)
from .gluon_compat import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)

HEAD_DIMS = (64,)  # at 128 the accumulators leave too few registers: 416 bytes are spilled
BLOCK_M = 64  # queries a step; more would spill
STAGES = 2  # steps of Q and of dO in shared memory


@gluon.jit
def query_steps(diagonal, length, BLOCK_M: gl.constexpr):
    """The first query that sees a key of the tile, and how many steps there are from it on."""
    begin = gl.maximum(diagonal, 0)
    return begin, gl.maximum(length - begin + BLOCK_M - 1, 0) // BLOCK_M


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, dout_desc, k_tile, v_tile, q_ring, dout_ring, kv_full, kv_empty,
    q_full, q_empty, dout_full, dout_empty, tiles, tile_count, key_heads, GROUP: gl.constexpr,
    D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, FIELDS: gl.constexpr,
    RAGGED: gl.constexpr,
):  # fmt: skip
    """Copy every tile's K and V, then Q and dO of all query heads of the group."""
    filled = 0  # steps copied so far
    done = 0  # key tiles so far
    tile_count = used_tiles(tiles, tile_count, FIELDS)
    for turn in range(turns_of(tile_count, key_heads)):
        head, first, count, q_start, diagonal, length = tile_of(
            tiles, tile_count, key_heads, turn, FIELDS
        )
        if count > 0:
            column = head * D
            mbarrier.wait(kv_empty, (done & 1) ^ 1)
            mbarrier.expect(kv_full, 4 * k_desc.block_type.nbytes)
            tma_load(k_desc, [first, column], kv_full, k_tile.index(0))
            tma_load(k_desc, [first + 64, column], kv_full, k_tile.index(1))
            tma_load(v_desc, [first, column], kv_full, v_tile.index(0))
            tma_load(v_desc, [first + 64, column], kv_full, v_tile.index(1))
            begin, steps = query_steps(diagonal, length, BLOCK_M)
            for i in range(GROUP * steps):
                query_column = (head * GROUP + i // steps) * D
                row = begin + i % steps * BLOCK_M
                place = [RAGGED, q_start + length, RAGGED - length + row, query_column]
                stage = (filled + i) % STAGES
                free = (((filled + i) // STAGES) & 1) ^ 1
                mbarrier.wait(q_empty.index(stage), free)
                mbarrier.expect(q_full.index(stage), q_desc.block_type.nbytes)
                tma_load(q_desc, place, q_full.index(stage), q_ring.index(stage))
                mbarrier.wait(dout_empty.index(stage), free)
                mbarrier.expect(dout_full.index(stage), dout_desc.block_type.nbytes)
                tma_load(dout_desc, place, dout_full.index(stage), dout_ring.index(stage))
            filled += GROUP * steps
            done += 1


@gluon.jit
def gradient_step(
    k, v, q_ring, dout_ring, q_full, q_empty, dout_full, dout_empty, dk, dv, lse, delta, first,
    row, length, earliest, step, scale_log2, SCORES: gl.constexpr, WEIGHTS: gl.constexpr,
    D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Add what ``BLOCK_M`` queries of one head contribute to dK / scale and dV of 64 keys."""
    stage = step % STAGES
    turn = (step // STAGES) & 1
    blank = gl.zeros([64, BLOCK_M], gl.float32, layout=SCORES)
    queries = row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, SCORES))
    # Behind the segment lse is infinite: P is 0 there without a comparison for every score.
    row_lse = gl.load(lse + first + queries, mask=queries < length, other=float("inf"))
    mbarrier.wait(q_full.index(stage), turn)
    q = q_ring.index(stage).reshape([BLOCK_M, D])
    scores = warpgroup_mma(k, q.permute((1, 0)), blank, use_acc=False, is_async=True)
    mbarrier.wait(dout_full.index(stage), turn)
    dout = dout_ring.index(stage).reshape([BLOCK_M, D])
    dp = warpgroup_mma(v, dout.permute((1, 0)), blank, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    # 1.4427 is log2(e)
    p = gl.exp2(scores * scale_log2 - (row_lse * 1.4426950408889634)[None, :])
    if MASKED:
        p = gl.where(queries[None, :] >= earliest[:, None], p, 0.0)
    weights = gl.convert_layout(p.to(q_ring.dtype), WEIGHTS)
    dv = warpgroup_mma(weights, dout, dv, is_async=True)
    row_delta = gl.load(delta + first + queries, mask=queries < length, other=0.0)
    dp = warpgroup_mma_wait(1, deps=[dp])
    ds = gl.convert_layout((p * (dp - row_delta[None, :])).to(q_ring.dtype), WEIGHTS)
    dk = warpgroup_mma(ds, q, dk, is_async=True)
    dv, weights = warpgroup_mma_wait(1, deps=[dv, weights])
    mbarrier.arrive(dout_empty.index(stage))
    dk, ds = warpgroup_mma_wait(0, deps=[dk, ds])
    mbarrier.arrive(q_empty.index(stage))
    return dk, dv


@gluon.jit
def consume(
    k_tile, v_tile, q_ring, dout_ring, kv_full, kv_empty, q_full, q_empty, dout_full, dout_empty,
    dk_out, dv_out, lse, delta, tiles, tile_count, key_heads, tokens, scale, scale_log2,
    HALF: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr, FIELDS: gl.constexpr,
):  # fmt: skip
    """Gradients of 64 keys of every tile of this program; the rest is the other consumer's."""
    DTYPE: gl.constexpr = q_ring.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTPUT, k_width=2)
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    k = k_tile.index(HALF)  # [64, D]
    v = v_tile.index(HALF)
    step = 0
    done = 0
    tile_count = used_tiles(tiles, tile_count, FIELDS)
    for turn in range(turns_of(tile_count, key_heads)):
        head, first, count, q_start, diagonal, length = tile_of(
            tiles, tile_count, key_heads, turn, FIELDS
        )
        if count > 0:
            begin, steps = query_steps(diagonal, length, BLOCK_M)
            keys = HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
            earliest = diagonal + keys  # the first query that sees each key
            # Steps whose first query sees the last of these keys need no mask.
            partial = gl.maximum(diagonal + HALF * 64 + 63 - begin + BLOCK_M - 1, 0) // BLOCK_M
            partial = gl.minimum(partial, steps)
            dk = gl.zeros([64, D], gl.float32, layout=OUTPUT)
            dv = gl.zeros([64, D], gl.float32, layout=OUTPUT)
            mbarrier.wait(kv_full, done & 1)
            for member in range(GROUP):
                row_stats = (head * GROUP + member).to(gl.int64) * tokens
                for i in range(partial):
                    dk, dv = gradient_step(
                        k, v, q_ring, dout_ring, q_full, q_empty, dout_full, dout_empty, dk, dv,
                        lse + row_stats, delta + row_stats, q_start, begin + i * BLOCK_M, length,
                        earliest, step + i, scale_log2, SCORES, WEIGHTS, D, BLOCK_M, STAGES, True,
                    )  # fmt: skip
                for i in range(partial, steps):
                    dk, dv = gradient_step(
                        k, v, q_ring, dout_ring, q_full, q_empty, dout_full, dout_empty, dk, dv,
                        lse + row_stats, delta + row_stats, q_start, begin + i * BLOCK_M, length,
                        earliest, step + i, scale_log2, SCORES, WEIGHTS, D, BLOCK_M, STAGES, False,
                    )  # fmt: skip
                step += steps
            mbarrier.arrive(kv_empty)
            done += 1
            rows = HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, STORE))
            columns = head * D + gl.arange(0, D, layout=gl.SliceLayout(0, STORE))
            place = (first + rows).to(gl.int64)[:, None] * (key_heads * D) + columns[None, :]
            inside = (rows < count)[:, None]
            gl.store(dk_out + place, gl.convert_layout((dk * scale).to(DTYPE), STORE), mask=inside)
            gl.store(dv_out + place, gl.convert_layout(dv.to(DTYPE), STORE), mask=inside)


@gluon.jit(do_not_specialize=["tile_count", "tokens"])
def dkdv_sm90_kernel(
    q_desc, k_desc, v_desc, dout_desc, dk, dv, lse, delta, tiles, tile_count, key_heads, tokens,
    scale, scale_log2, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr, FIELDS: gl.constexpr, RAGGED: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Barriers and buffers; the work is in ``produce`` and ``consume``."""
    DTYPE: gl.constexpr = q_desc.dtype
    k_tile = gl.allocate_shared_memory(DTYPE, [2, 64, D], k_desc.layout)
    v_tile = gl.allocate_shared_memory(DTYPE, [2, 64, D], v_desc.layout)
    q_ring = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_M, D], q_desc.layout)
    dout_ring = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_M, D], dout_desc.layout)
    full, empty = barriers(1, 2)
    kv_full, kv_empty = full.index(0), empty.index(0)
    q_full, q_empty = barriers(STAGES, 2)
    dout_full, dout_empty = barriers(STAGES, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (k_tile, v_tile, q_ring, dout_ring, kv_full, kv_empty, q_full, q_empty,
                       dout_full, dout_empty, dk, dv, lse, delta, tiles, tile_count, key_heads,
                       tokens, scale, scale_log2, 0, GROUP, D, BLOCK_M, STAGES, FIELDS)),
            (consume, (k_tile, v_tile, q_ring, dout_ring, kv_full, kv_empty, q_full, q_empty,
                       dout_full, dout_empty, dk, dv, lse, delta, tiles, tile_count, key_heads,
                       tokens, scale, scale_log2, 1, GROUP, D, BLOCK_M, STAGES, FIELDS)),
            (produce, (q_desc, k_desc, v_desc, dout_desc, k_tile, v_tile, q_ring, dout_ring,
                       kv_full, kv_empty, q_full, q_empty, dout_full, dout_empty, tiles,
                       tile_count, key_heads, GROUP, D, BLOCK_M, STAGES, FIELDS, RAGGED)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def key_gradients_sm90(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    dout: Tensor,
    column_tiles: Tensor,
    scale: float,
    programs: int,
) -> tuple[Tensor, Tensor]:
    """dK and dV.

    Args:
        q: ``[Tq, Hq, Dh]``, bfloat16 or float16, ``Dh`` 64, last dimension contiguous.
        k: ``[Tk, Hkv, Dh]``.
        v: ``[Tk, Hkv, Dh]``.
        lse: fp32 ``[Hq, Tq]`` of the forward pass.
        delta: fp32 ``[Hq, Tq]`` of ``query_gradient``.
        dout: ``[Tq, Hq, Dh]``.
        column_tiles: ``Tiles.columns`` made with 128 columns.
        scale: factor of the scores, positive.
        programs: programs to run, the GPU's multiprocessors.

    Returns:
        Gradients in the shapes and dtypes of k and v, contiguous.
    """
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    q, k, v, dout = (with_adjacent_heads(x) for x in (q, k, v, dout))
    tokens, heads, size = q.shape
    key_heads = k.shape[1]
    dkdv_sm90_kernel[(programs,)](
        ragged_descriptor(q, BLOCK_M),
        descriptor(k, 64),
        descriptor(v, 64),
        ragged_descriptor(dout, BLOCK_M),
        dk,
        dv,
        lse,
        delta,
        column_tiles,
        len(column_tiles),
        key_heads,
        tokens,
        scale,
        scale * 1.4426950408889634,
        GROUP=heads // key_heads,
        D=size,
        BLOCK_M=BLOCK_M,
        STAGES=STAGES,
        FIELDS=FIELDS,
        RAGGED=RAGGED,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return dk, dv
