"""dQ for sm_90 in Gluon: one producer warp, two consumer warpgroups of 64 queries each.

A persistent kernel over the row tiles of ``tile_scheduler``. Q and dO of a tile stay in shared
memory while K and V stream by:

    issue S = Q K^T;  issue dP = dO V^T;  wait S;  P;  wait dP;  dS;  issue dQ += dS K

It also writes delta = sum(dO * O) - dLSE of its rows for the gradients of the keys. dQ is
accumulated in fp32 registers and written once. K and V are read through ragged descriptors: rows
behind the last visible key arrive as zeros.
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

BLOCK_N = {64: 128, 128: 64}  # keys a step
STAGES = 2  # steps of K and of V in shared memory


@gluon.jit
def key_steps(end, BLOCK_N: gl.constexpr):
    return (gl.maximum(end, 0) + BLOCK_N - 1) // BLOCK_N


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, dout_desc, q_tile, dout_tile, k_ring, v_ring, q_full, q_empty, k_full,
    k_empty, v_full, v_empty, tiles, tile_count, heads, GROUP: gl.constexpr, D: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, FIELDS: gl.constexpr, RAGGED: gl.constexpr,
):  # fmt: skip
    """Copy every tile's Q and dO, then K and V from the segment's start to the diagonal."""
    filled = 0  # steps copied so far
    done = 0  # query tiles so far
    tile_count = used_tiles(tiles, tile_count, FIELDS)
    for turn in range(turns_of(tile_count, heads)):
        head, first, count, k_start, diagonal, _length = tile_of(
            tiles, tile_count, heads, turn, FIELDS
        )
        if count > 0:
            mbarrier.wait(q_empty, (done & 1) ^ 1)
            mbarrier.expect(q_full, 4 * q_desc.block_type.nbytes)
            tma_load(q_desc, [first, head * D], q_full, q_tile.index(0))
            tma_load(q_desc, [first + 64, head * D], q_full, q_tile.index(1))
            tma_load(dout_desc, [first, head * D], q_full, dout_tile.index(0))
            tma_load(dout_desc, [first + 64, head * D], q_full, dout_tile.index(1))
            end = diagonal + count
            steps = key_steps(end, BLOCK_N)
            for i in range(steps):
                place = [RAGGED, k_start + end, RAGGED - end + i * BLOCK_N, head // GROUP * D]
                stage = (filled + i) % STAGES
                free = (((filled + i) // STAGES) & 1) ^ 1
                mbarrier.wait(k_empty.index(stage), free)
                mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
                tma_load(k_desc, place, k_full.index(stage), k_ring.index(stage))
                mbarrier.wait(v_empty.index(stage), free)
                mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
                tma_load(v_desc, place, v_full.index(stage), v_ring.index(stage))
            filled += steps
            done += 1


@gluon.jit
def rows_of_softmax(
    out, dout, dout_row, dout_head, lse, dlse, rows, inside, head, heads, tokens, D: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """lse, delta = sum(dO * O) - dLSE and their place in ``[Hq, Tq]``, of rows of one head."""
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    head = head.to(gl.int64)
    tokens_of = rows.to(gl.int64)
    place = tokens_of[:, None] * (heads * D) + head * D + columns
    dout_place = tokens_of[:, None] * dout_row + head * dout_head + columns
    o = gl.load(out + place, mask=inside[:, None], other=0.0).to(gl.float32)
    do = gl.load(dout + dout_place, mask=inside[:, None], other=0.0).to(gl.float32)
    stats = head * tokens + tokens_of
    row_lse = gl.load(lse + stats, mask=inside, other=0.0)
    delta = gl.sum(o * do, 1) - gl.load(dlse + stats, mask=inside, other=0.0)
    # A row that sees no key has no gradient, whatever came from above.
    return row_lse, gl.where(row_lse == float("-inf"), 0.0, delta), stats


@gluon.jit
def gradient_step(
    q, dout, k_ring, v_ring, k_full, k_empty, v_full, v_empty, dq, lse_log2, delta, limit,
    first_key, step, scale_log2, SCORES: gl.constexpr, WEIGHTS: gl.constexpr, D: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Add what ``BLOCK_N`` keys contribute to dQ / scale of 64 queries."""
    stage = step % STAGES
    turn = (step // STAGES) & 1
    blank = gl.zeros([64, BLOCK_N], gl.float32, layout=SCORES)
    mbarrier.wait(k_full.index(stage), turn)
    k = k_ring.index(stage).reshape([BLOCK_N, D])
    scores = warpgroup_mma(q, k.permute((1, 0)), blank, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(stage), turn)
    v = v_ring.index(stage).reshape([BLOCK_N, D])
    dp = warpgroup_mma(dout, v.permute((1, 0)), blank, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    p = gl.exp2(scores * scale_log2 - lse_log2[:, None])
    if MASKED:
        keys = first_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
        p = gl.where(keys[None, :] <= limit[:, None], p, 0.0)
    dp = warpgroup_mma_wait(0, deps=[dp])
    mbarrier.arrive(v_empty.index(stage))
    ds = gl.convert_layout((p * (dp - delta[:, None])).to(k_ring.dtype), WEIGHTS)
    dq = warpgroup_mma(ds, k, dq, is_async=True)
    dq, ds = warpgroup_mma_wait(0, deps=[dq, ds])
    mbarrier.arrive(k_empty.index(stage))
    return dq


@gluon.jit
def consume(
    q_tile, dout_tile, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty, out,
    dout, dout_row, dout_head, lse, dlse, delta, dq_out, tiles, tile_count, heads, tokens, scale,
    scale_log2, HALF: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    FIELDS: gl.constexpr,
):  # fmt: skip
    """dQ of 64 rows of every tile of this program; the rest is the other consumer's."""
    DTYPE: gl.constexpr = q_tile.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTPUT, k_width=2)
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    step = 0
    done = 0
    tile_count = used_tiles(tiles, tile_count, FIELDS)
    for turn in range(turns_of(tile_count, heads)):
        head, first, count, _k_start, diagonal, _length = tile_of(
            tiles, tile_count, heads, turn, FIELDS
        )
        if count > 0:
            rows = HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, STORE))
            inside = rows < count
            row_lse, row_delta, stats = rows_of_softmax(
                out, dout, dout_row, dout_head, lse, dlse, first + rows, inside, head, heads,
                tokens, D, STORE,
            )  # fmt: skip
            gl.store(delta + stats, row_delta, mask=inside)
            row_delta = gl.convert_layout(row_delta, gl.SliceLayout(1, SCORES))
            # 1.4427 is log2(e)
            row_lse = gl.convert_layout(row_lse * 1.4426950408889634, gl.SliceLayout(1, SCORES))
            limit = diagonal + HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
            steps = key_steps(diagonal + count, BLOCK_N)
            # Steps whose last key the first row sees need no mask.
            plain = gl.minimum(gl.maximum(diagonal + HALF * 64 + 1, 0) // BLOCK_N, steps)
            dq = gl.zeros([64, D], gl.float32, layout=OUTPUT)
            mbarrier.wait(q_full, done & 1)
            for i in range(plain):
                dq = gradient_step(
                    q_tile.index(HALF), dout_tile.index(HALF), k_ring, v_ring, k_full, k_empty,
                    v_full, v_empty, dq, row_lse, row_delta, limit, i * BLOCK_N, step + i,
                    scale_log2, SCORES, WEIGHTS, D, BLOCK_N, STAGES, False,
                )  # fmt: skip
            for i in range(plain, steps):
                dq = gradient_step(
                    q_tile.index(HALF), dout_tile.index(HALF), k_ring, v_ring, k_full, k_empty,
                    v_full, v_empty, dq, row_lse, row_delta, limit, i * BLOCK_N, step + i,
                    scale_log2, SCORES, WEIGHTS, D, BLOCK_N, STAGES, True,
                )  # fmt: skip
            mbarrier.arrive(q_empty)
            step += steps
            done += 1
            values = gl.convert_layout((dq * scale).to(DTYPE), STORE)
            columns = head * D + gl.arange(0, D, layout=gl.SliceLayout(0, STORE))
            place = (first + rows).to(gl.int64)[:, None] * (heads * D) + columns[None, :]
            gl.store(dq_out + place, values, mask=inside[:, None])


@gluon.jit(do_not_specialize=["tile_count", "tokens"])
def dq_sm90_kernel(
    q_desc, k_desc, v_desc, dout_desc, out, dout, dout_row, dout_head, lse, dlse, delta, dq, tiles,
    tile_count, heads, tokens, scale, scale_log2, GROUP: gl.constexpr, D: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, FIELDS: gl.constexpr, RAGGED: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Barriers and buffers; the work is in ``produce`` and ``consume``."""
    DTYPE: gl.constexpr = q_desc.dtype
    q_tile = gl.allocate_shared_memory(DTYPE, [2, 64, D], q_desc.layout)
    dout_tile = gl.allocate_shared_memory(DTYPE, [2, 64, D], dout_desc.layout)
    k_ring = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, D], v_desc.layout)
    full, empty = barriers(1, 2)
    q_full, q_empty = full.index(0), empty.index(0)
    k_full, k_empty = barriers(STAGES, 2)
    v_full, v_empty = barriers(STAGES, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (q_tile, dout_tile, k_ring, v_ring, q_full, q_empty, k_full, k_empty,
                       v_full, v_empty, out, dout, dout_row, dout_head, lse, dlse, delta, dq,
                       tiles, tile_count, heads, tokens, scale, scale_log2, 0, D, BLOCK_N, STAGES,
                       FIELDS)),
            (consume, (q_tile, dout_tile, k_ring, v_ring, q_full, q_empty, k_full, k_empty,
                       v_full, v_empty, out, dout, dout_row, dout_head, lse, dlse, delta, dq,
                       tiles, tile_count, heads, tokens, scale, scale_log2, 1, D, BLOCK_N, STAGES,
                       FIELDS)),
            (produce, (q_desc, k_desc, v_desc, dout_desc, q_tile, dout_tile, k_ring, v_ring,
                       q_full, q_empty, k_full, k_empty, v_full, v_empty, tiles, tile_count,
                       heads, GROUP, D, BLOCK_N, STAGES, FIELDS, RAGGED)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def query_gradient_sm90(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    row_tiles: Tensor,
    scale: float,
    programs: int,
) -> tuple[Tensor, Tensor]:
    """dQ, and delta fp32 ``[Hq, Tq]``, which the gradients of the keys need.

    Args:
        q: ``[Tq, Hq, Dh]``, bfloat16 or float16, ``Dh`` 64 or 128, last dimension contiguous.
        k: ``[Tk, Hkv, Dh]``.
        v: ``[Tk, Hkv, Dh]``.
        out: contiguous ``[Tq, Hq, Dh]`` of the forward pass.
        lse: fp32 contiguous ``[Hq, Tq]`` of the forward pass.
        dout: ``[Tq, Hq, Dh]``.
        dlse: fp32 contiguous ``[Hq, Tq]``.
        row_tiles: ``Tiles.rows`` made with 128 rows.
        scale: factor of the scores, positive.
        programs: programs to run, the GPU's multiprocessors.
    """
    dq, delta = torch.empty_like(q, memory_format=torch.contiguous_format), torch.empty_like(lse)
    q, k, v, dout = (with_adjacent_heads(x) for x in (q, k, v, dout))
    tokens, heads, size = q.shape
    block_n = BLOCK_N[size]
    dq_sm90_kernel[(programs,)](
        descriptor(q, 64),
        ragged_descriptor(k, block_n),
        ragged_descriptor(v, block_n),
        descriptor(dout, 64),
        out,
        dout,
        *dout.stride()[:2],
        lse,
        dlse,
        delta,
        dq,
        row_tiles,
        len(row_tiles),
        heads,
        tokens,
        scale,
        scale * 1.4426950408889634,
        GROUP=heads // k.shape[1],
        D=size,
        BLOCK_N=block_n,
        STAGES=STAGES,
        FIELDS=FIELDS,
        RAGGED=RAGGED,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return dq, delta
