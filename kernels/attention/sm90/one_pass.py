"""All gradients in one pass for sm_90 in Gluon: one producer warp, eight warps that own 128 keys.

A persistent kernel over the column tiles of ``tile_scheduler``. K and V of a tile stay in shared
memory, dK and dV in registers, while Q and dO of all query heads of the group stream by
(FlashAttention-3, 2407.08608):

    issue S' = K Q^T;  issue dP' = V dO^T;  wait S';  P';  issue dV += P' dO;  wait dP';  dS';
    issue dQ = dS K;  issue dK += dS' Q;  wait dQ;  add dQ to memory

Five products where dQ and dK/dV in kernels of their own take seven. In return every tile adds its
part of dQ to fp32 memory, by the reduction of TMA and in any order: dQ is not bitwise the same in
every run, dK and dV are. K, V, Q and dO are read, and dQ is added to, through ragged descriptors:
rows behind the segment arrive as zeros and are left as they are. Without dQ the kernel is the
deterministic pass's dK and dV of large heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tile_scheduler import FIELDS
from .dkdv import query_steps
from .dq import rows_of_softmax
from .forward import (
    PRODUCER_REGISTERS,
    RAGGED,
    barriers,
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
    tma_add,
    tma_load,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)

BLOCK_M = 64  # queries a step
BLOCK_N = 128  # keys a tile
STAGES = 2  # steps of Q and of dO in shared memory
DELTA_ROWS = 64  # rows of a program of ``delta_kernel``


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
            keys = [RAGGED, first + count, RAGGED - count, head * D]
            mbarrier.wait(kv_empty, (done & 1) ^ 1)
            mbarrier.expect(kv_full, 2 * k_desc.block_type.nbytes)
            tma_load(k_desc, keys, kv_full, k_tile)
            tma_load(v_desc, keys, kv_full, v_tile)
            begin, steps = query_steps(diagonal, length, BLOCK_M)
            for i in range(GROUP * steps):
                column = (head * GROUP + i // steps) * D
                row = begin + i % steps * BLOCK_M
                queries = [RAGGED, q_start + length, RAGGED - length + row, column]
                stage = (filled + i) % STAGES
                free = (((filled + i) // STAGES) & 1) ^ 1
                mbarrier.wait(q_empty.index(stage), free)
                mbarrier.expect(q_full.index(stage), q_desc.block_type.nbytes)
                tma_load(q_desc, queries, q_full.index(stage), q_ring.index(stage))
                mbarrier.wait(dout_empty.index(stage), free)
                mbarrier.expect(dout_full.index(stage), dout_desc.block_type.nbytes)
                tma_load(dout_desc, queries, dout_full.index(stage), dout_ring.index(stage))
            filled += GROUP * steps
            done += 1


@gluon.jit
def gradient_step(
    k, v, q_ring, dout_ring, lse_tile, delta_tile, ds_tile, dq_desc, dq_tile, q_full, q_empty,
    dout_full, dout_empty, dk, dv, lse, delta, q_start, column, row, length, earliest, step,
    scale_log2, SCORES: gl.constexpr, WEIGHTS: gl.constexpr, QUERIES: gl.constexpr,
    STATS: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, RAGGED: gl.constexpr, WITH_DQ: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Add what ``BLOCK_M`` queries of one head give to dK / scale and dV, and get in dQ / scale."""
    stage = step % STAGES
    turn = (step // STAGES) & 1
    blank = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout=SCORES)
    # A value a thread; spread over those that hold its scores by way of shared memory.
    near = row + gl.arange(0, BLOCK_M, layout=STATS)
    row_lse = gl.load(lse + q_start + near, mask=near < length, other=0.0)
    row_delta = gl.load(delta + q_start + near, mask=near < length, other=0.0)
    mbarrier.wait(q_full.index(stage), turn)
    q = q_ring.index(stage).reshape([BLOCK_M, D])
    scores = warpgroup_mma(k, q.permute((1, 0)), blank, use_acc=False, is_async=True)
    mbarrier.wait(dout_full.index(stage), turn)
    dout = dout_ring.index(stage).reshape([BLOCK_M, D])
    dp = warpgroup_mma(v, dout.permute((1, 0)), blank, use_acc=False, is_async=True)
    lse_tile.store(row_lse * 1.4426950408889634)  # log2(e)
    delta_tile.store(row_delta)
    scores = warpgroup_mma_wait(1, deps=[scores])
    # Behind the segment P is 1 and dO is 0.
    p = gl.exp2(scores * scale_log2 - lse_tile.load(gl.SliceLayout(0, SCORES))[None, :])
    if MASKED:
        queries = row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, SCORES))
        p = gl.where(queries[None, :] >= earliest[:, None], p, 0.0)
    weights = gl.convert_layout(p.to(q_ring.dtype), WEIGHTS)
    dv = warpgroup_mma(weights, dout, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=[dp])
    ds = (p * (dp - delta_tile.load(gl.SliceLayout(0, SCORES))[None, :])).to(q_ring.dtype)
    if WITH_DQ:
        ds_tile.store(ds)
        fence_async_shared()
        blank = gl.zeros([BLOCK_M, D], gl.float32, layout=QUERIES)
        dq = warpgroup_mma(ds_tile.permute((1, 0)), k, blank, use_acc=False, is_async=True)
        ds = gl.convert_layout(ds, WEIGHTS)
        dk = warpgroup_mma(ds, q, dk, is_async=True)
        dv, weights, dq = warpgroup_mma_wait(1, deps=[dv, weights, dq])
        mbarrier.arrive(dout_empty.index(stage))
        tma_store_wait(0)  # the last step's part has been read
        dq_tile.reshape([BLOCK_M, D]).store(dq)
        fence_async_shared()
        tma_add(dq_desc, [RAGGED, q_start + length, RAGGED - length + row, column], dq_tile)
    else:
        ds = gl.convert_layout(ds, WEIGHTS)
        dk = warpgroup_mma(ds, q, dk, is_async=True)
        dv, weights = warpgroup_mma_wait(1, deps=[dv, weights])
        mbarrier.arrive(dout_empty.index(stage))
    dk, ds = warpgroup_mma_wait(0, deps=[dk, ds])
    mbarrier.arrive(q_empty.index(stage))
    return dk, dv


@gluon.jit
def consume(
    k_tile, v_tile, q_ring, dout_ring, lse_tile, delta_tile, ds_tile, dq_desc, dq_tile, kv_full,
    kv_empty, q_full, q_empty, dout_full, dout_empty, dk_out, dv_out, lse, delta, tiles, tile_count,
    key_heads, tokens, scale, scale_log2, GROUP: gl.constexpr, D: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, FIELDS: gl.constexpr,
    RAGGED: gl.constexpr, WITH_DQ: gl.constexpr,
):  # fmt: skip
    """Gradients of the keys of every tile of this program, and their part of dQ."""
    DTYPE: gl.constexpr = q_ring.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_M, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTPUT, k_width=2)
    # The two warp groups share the queries of dQ: half of the columns each.
    QUERIES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, D // 2, 16])
    STATS: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [8, 1], [1, 0])
    k = k_tile.reshape([BLOCK_N, D])
    v = v_tile.reshape([BLOCK_N, D])
    step = 0
    done = 0
    tile_count = used_tiles(tiles, tile_count, FIELDS)
    for turn in range(turns_of(tile_count, key_heads)):
        head, first, count, q_start, diagonal, length = tile_of(
            tiles, tile_count, key_heads, turn, FIELDS
        )
        if count > 0:
            begin, steps = query_steps(diagonal, length, BLOCK_M)
            # The first query that sees each key; behind the segment no query does.
            earliest = diagonal + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, SCORES))
            # Steps whose first query sees the last key need no mask.
            partial = gl.maximum(diagonal + BLOCK_N - 1 - begin + BLOCK_M - 1, 0) // BLOCK_M
            partial = gl.minimum(partial, steps)
            dk = gl.zeros([BLOCK_N, D], gl.float32, layout=OUTPUT)
            dv = gl.zeros([BLOCK_N, D], gl.float32, layout=OUTPUT)
            mbarrier.wait(kv_full, done & 1)
            for member in range(GROUP):
                query_head = head * GROUP + member
                row_stats = query_head.to(gl.int64) * tokens
                for i in range(partial):
                    dk, dv = gradient_step(
                        k, v, q_ring, dout_ring, lse_tile, delta_tile, ds_tile, dq_desc, dq_tile,
                        q_full, q_empty, dout_full, dout_empty, dk, dv, lse + row_stats,
                        delta + row_stats, q_start, query_head * D, begin + i * BLOCK_M, length,
                        earliest, step + i, scale_log2, SCORES, WEIGHTS, QUERIES, STATS, D,
                        BLOCK_M, BLOCK_N, STAGES, RAGGED, WITH_DQ, True,
                    )  # fmt: skip
                for i in range(partial, steps):
                    dk, dv = gradient_step(
                        k, v, q_ring, dout_ring, lse_tile, delta_tile, ds_tile, dq_desc, dq_tile,
                        q_full, q_empty, dout_full, dout_empty, dk, dv, lse + row_stats,
                        delta + row_stats, q_start, query_head * D, begin + i * BLOCK_M, length,
                        earliest, step + i, scale_log2, SCORES, WEIGHTS, QUERIES, STATS, D,
                        BLOCK_M, BLOCK_N, STAGES, RAGGED, WITH_DQ, False,
                    )  # fmt: skip
                step += steps
            mbarrier.arrive(kv_empty)
            done += 1
            rows = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, STORE))
            columns = head * D + gl.arange(0, D, layout=gl.SliceLayout(0, STORE))
            place = (first + rows).to(gl.int64)[:, None] * (key_heads * D) + columns[None, :]
            inside = (rows < count)[:, None]
            gl.store(dk_out + place, gl.convert_layout((dk * scale).to(DTYPE), STORE), mask=inside)
            gl.store(dv_out + place, gl.convert_layout(dv.to(DTYPE), STORE), mask=inside)
    tma_store_wait(0)  # shared memory is given back


@gluon.jit(do_not_specialize=["tile_count", "tokens"])
def one_pass_kernel(
    q_desc, k_desc, v_desc, dout_desc, dq_desc, dk, dv, lse, delta, tiles, tile_count, key_heads,
    tokens, scale, scale_log2, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, FIELDS: gl.constexpr, RAGGED: gl.constexpr,
    WITH_DQ: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Barriers and buffers; the work is in ``produce`` and ``consume``."""
    DTYPE: gl.constexpr = q_desc.dtype
    k_tile = gl.allocate_shared_memory(DTYPE, [1, 1, BLOCK_N, D], k_desc.layout)
    v_tile = gl.allocate_shared_memory(DTYPE, [1, 1, BLOCK_N, D], v_desc.layout)
    q_ring = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_M, D], q_desc.layout)
    dout_ring = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_M, D], dout_desc.layout)
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lse_tile = gl.allocate_shared_memory(gl.float32, [BLOCK_M], ROWS)
    delta_tile = gl.allocate_shared_memory(gl.float32, [BLOCK_M], ROWS)
    ds_tile = k_tile
    dq_tile = k_tile
    if WITH_DQ:
        TRANSPOSED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], DTYPE)
        ds_tile = gl.allocate_shared_memory(DTYPE, [BLOCK_N, BLOCK_M], TRANSPOSED)
        dq_tile = gl.allocate_shared_memory(gl.float32, [1, 1, BLOCK_M, D], dq_desc.layout)
    full, empty = barriers(1, 1)
    kv_full, kv_empty = full.index(0), empty.index(0)
    q_full, q_empty = barriers(STAGES, 1)
    dout_full, dout_empty = barriers(STAGES, 1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (k_tile, v_tile, q_ring, dout_ring, lse_tile, delta_tile, ds_tile, dq_desc,
                       dq_tile, kv_full, kv_empty, q_full, q_empty, dout_full, dout_empty, dk, dv,
                       lse, delta, tiles, tile_count, key_heads, tokens, scale, scale_log2, GROUP,
                       D, BLOCK_M, BLOCK_N, STAGES, FIELDS, RAGGED, WITH_DQ)),
            (produce, (q_desc, k_desc, v_desc, dout_desc, k_tile, v_tile, q_ring, dout_ring,
                       kv_full, kv_empty, q_full, q_empty, dout_full, dout_empty, tiles,
                       tile_count, key_heads, GROUP, D, BLOCK_M, STAGES, FIELDS, RAGGED)),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )  # fmt: skip


@gluon.jit(do_not_specialize=["tokens"])
def delta_kernel(
    out, dout, dout_row, dout_head, lse, dlse, delta, heads, tokens, D: gl.constexpr,
    ROWS: gl.constexpr,
):  # fmt: skip
    """delta of ``ROWS`` rows of one head."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    head = gl.program_id(0) % heads
    rows = gl.program_id(0) // heads * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    _, row_delta, stats = rows_of_softmax(
        out, dout, dout_row, dout_head, lse, dlse, rows, rows < tokens, head, heads, tokens, D,
        LAYOUT,
    )  # fmt: skip
    gl.store(delta + stats, row_delta, mask=rows < tokens)


def gradients_sm90(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    column_tiles: Tensor,
    scale: float,
    programs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV; dQ is summed in fp32, in no order.

    Args:
        q: ``[Tq, Hq, Dh]``, bfloat16 or float16, ``Dh`` 64 or 128, last dimension contiguous.
        k: ``[Tk, Hkv, Dh]``.
        v: ``[Tk, Hkv, Dh]``.
        out: contiguous ``[Tq, Hq, Dh]`` of the forward pass.
        lse: fp32 contiguous ``[Hq, Tq]`` of the forward pass.
        dout: ``[Tq, Hq, Dh]``.
        dlse: fp32 contiguous ``[Hq, Tq]``.
        column_tiles: ``Tiles.columns`` made with 128 columns.
        scale: factor of the scores, positive.
        programs: programs to run, the GPU's multiprocessors.

    Returns:
        Gradients in the shapes and dtypes of q, k and v, contiguous.
    """
    tokens, heads, size = q.shape
    delta = torch.empty_like(lse)
    dout = with_adjacent_heads(dout)
    delta_kernel[((tokens + DELTA_ROWS - 1) // DELTA_ROWS * heads,)](
        out,
        dout,
        *dout.stride()[:2],
        lse,
        dlse,
        delta,
        heads,
        tokens,
        D=size,
        ROWS=DELTA_ROWS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    dq_sum = torch.zeros(tokens, heads, size, dtype=torch.float32, device=q.device)
    dk, dv = launch(q, k, v, lse, delta, dout, dq_sum, column_tiles, scale, programs)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    return torch.mul(dq_sum, scale, out=dq), dk, dv


def key_gradients_of_eight_warps(
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
    """dK and dV alone: ``dkdv.key_gradients_sm90`` for head dimension 128."""
    return launch(q, k, v, lse, delta, dout, None, column_tiles, scale, programs)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    dout: Tensor,
    dq_sum: Tensor | None,
    column_tiles: Tensor,
    scale: float,
    programs: int,
) -> tuple[Tensor, Tensor]:
    """dK and dV; dQ / scale is added to ``dq_sum``."""
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    q, k, v, dout = (with_adjacent_heads(x) for x in (q, k, v, dout))
    tokens, heads, size = q.shape
    key_heads = k.shape[1]
    k_desc = ragged_descriptor(k, BLOCK_N)
    one_pass_kernel[(programs,)](
        ragged_descriptor(q, BLOCK_M),
        k_desc,
        ragged_descriptor(v, BLOCK_N),
        ragged_descriptor(dout, BLOCK_M),
        k_desc if dq_sum is None else ragged_descriptor(dq_sum, BLOCK_M),
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
        BLOCK_N=BLOCK_N,
        STAGES=STAGES,
        FIELDS=FIELDS,
        RAGGED=RAGGED,
        WITH_DQ=dq_sum is not None,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return dk, dv
