"""dK and dV for sm_90 in Gluon, and dQ in the same pass: one producer warp, eight consumer warps.

A persistent kernel over the key tiles of ``tile_scheduler``. K and V of a tile stay in shared
memory, dK and dV in registers, while Q and dO of all query heads of the group stream by; scores are
computed transposed, so that P and dS are operands in registers (FlashAttention-3, 2407.08608):

    issue S' = K Q^T;  issue dP' = V dO^T;  wait S';  P';  issue dV += P' dO;  wait dP';  dS';
    (issue dQ = dS K;)  issue dK += dS' Q;  (wait dQ;  add dQ to memory)

dK and dV are written once: no atomics, no fp32 scratch, bitwise the same in every run. With dQ it
takes five products where kernels of their own take seven; in return every tile adds its part of dQ
to fp32 memory, by the reduction of TMA and in any order: dQ is not bitwise the same in every run.
dQ needs dS of all keys, so one consumer of eight warps owns the whole tile; without dQ there are
two of four warps, each with half of the keys, where their sums leave enough registers.

Q, dO, K and V are read, and dQ is added to, through ragged descriptors: rows behind the segment
arrive as zeros and are left as they are. The producer also brings log-sum-exp and delta of the
queries, in base 2, so that the consumers hold no addresses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..saved import Saved
from .gluon_compat import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_add,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .pipeline import (
    CONSUMER_REGISTERS,
    Ring,
    accumulate,
    barriers,
    descriptors,
    entry,
    expect,
    fill,
    finish,
    load_rows,
    make_ring,
    matrix,
    operands,
    pair,
    product,
    sizes,
    store_rows,
    sums_layout,
    tile_of,
    times,
    turns_of,
    walk_over,
    with_adjacent_heads,
    zeros,
)

BLOCK_M = 64  # queries a step; more would spill
KEYS = 128  # of a tile
STAGES = 2  # steps of Q and of dO in shared memory
CONSUMERS = {64: 2, 96: 2, 128: 1}  # of dK and dV alone; two would spill 416 bytes at 128


@gluon.jit
def query_steps(diagonal, length, BLOCK_M: gl.constexpr):
    """The first query that sees a key of the tile, and how many steps there are from it on."""
    begin = gl.maximum(diagonal, 0)
    return begin, gl.maximum(length - begin + BLOCK_M - 1, 0) // BLOCK_M


@gluon.jit
def produce(
    q_descs, k_descs, v_descs, dout_descs, q, k, v, dout, stats, lse, delta, walk, tokens,
    GROUP: gl.constexpr, CONSUMERS: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    BLOCK_M: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, FIELDS: gl.constexpr,
    RAGGED: gl.constexpr,
):  # fmt: skip
    """Copy every tile's K and V, then Q, dO, log-sum-exp and delta of the group's query heads."""
    near = gl.arange(0, BLOCK_M, layout=gl.BlockedLayout([2], [32], [1], [0]))
    filled = 0  # steps copied so far
    done = 0  # key tiles so far
    for turn in range(turns_of(walk)):
        head, first, count, q_start, diagonal, length = tile_of(walk, turn, FIELDS)
        if count > 0:
            column = head * (D0 + D1)
            mbarrier.wait(k.empty.index(0), (done & 1) ^ 1)
            full = k.full.index(0)
            expect(full, k_descs, 2 * CONSUMERS)
            for part in gl.static_range(CONSUMERS):
                row, end = first + part * KEYS, first + count
                load_rows(k_descs, row, end, column, full, entry(k.tile, part), D0, RAGGED)
                load_rows(v_descs, row, end, column, full, entry(v.tile, part), D0, RAGGED)
            begin, steps = query_steps(diagonal, length, BLOCK_M)
            end = q_start + length
            for i in range(GROUP * steps):
                query_head = head * GROUP + i // steps
                row = q_start + begin + i % steps * BLOCK_M
                column = query_head * (D0 + D1)
                fill(q, q_descs, filled + i, row, end, column, D0, STAGES, RAGGED)
                fill(dout, dout_descs, filled + i, row, end, column, D0, STAGES, RAGGED)
                # The stage of Q was free: so is that of the rows' numbers.
                stage = (filled + i) % STAGES
                place = query_head.to(gl.int64) * tokens + row + near
                inside = row + near < end
                # Behind the segment P is 1, and dO and dP - delta are 0.
                row_lse = gl.load(lse + place, mask=inside, other=0.0) * 1.4426950408889634
                stats.tile[0].index(stage).store(row_lse)
                row_delta = gl.load(delta + place, mask=inside, other=0.0)
                stats.tile[1].index(stage).store(-row_delta)
                mbarrier.arrive(stats.full.index(stage))
            filled += GROUP * steps
            done += 1


@gluon.jit
def gradient_step(
    k, v, q, dout, stats, ds_tile, dq_descs, dq_tile, dk, dv, row, end, column, earliest, first,
    step, scale_log2, D0: gl.constexpr, D1: gl.constexpr, BLOCK_M: gl.constexpr,
    KEYS: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr, RAGGED: gl.constexpr,
    WITH_DQ: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Add what ``BLOCK_M`` queries of one head give to dK / scale and dV, and get in dQ / scale."""
    stage = step % STAGES
    turn = (step // STAGES) & 1
    SCORES: gl.constexpr = sums_layout(BLOCK_M, WARPS)
    blank = gl.zeros([KEYS, BLOCK_M], gl.float32, layout=SCORES)
    mbarrier.wait(q.full.index(stage), turn)
    queries = matrix(entry(q.tile, stage), BLOCK_M, D0, D1)
    scores = product(k, queries, blank, False)
    mbarrier.wait(dout.full.index(stage), turn)
    douts = matrix(entry(dout.tile, stage), BLOCK_M, D0, D1)
    mbarrier.wait(stats.full.index(stage), turn)
    # dP starts at -delta.
    row_delta = stats.tile[1].index(stage).load(gl.SliceLayout(0, SCORES))
    dp = product(v, douts, blank + row_delta[None, :], True)
    row_lse = stats.tile[0].index(stage).load(gl.SliceLayout(0, SCORES))
    scores = warpgroup_mma_wait(len(k), deps=[scores])
    p = gl.exp2(scores * scale_log2 - row_lse[None, :])
    if MASKED:
        place = first + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, SCORES))
        p = gl.where(place[None, :] >= earliest[:, None], p, 0.0)
    weights = operands(p.to(q.tile[0].dtype), D0, D1, WARPS)
    dv = accumulate(weights, douts, dv)
    dp = warpgroup_mma_wait(len(k), deps=[dp])
    ds = (p * dp).to(q.tile[0].dtype)
    if WITH_DQ:
        ds_tile.store(ds)
        fence_async_shared()
        ds_rows = ds_tile.permute((1, 0))
        zero = dq_zeros(BLOCK_M, D0)
        dq_first = warpgroup_mma(ds_rows, k[0], zero, use_acc=False, is_async=True)
        dq_rest = dq_first
        if D1 > 0:
            zero = dq_zeros(BLOCK_M, D1)
            dq_rest = warpgroup_mma(ds_rows, k[1], zero, use_acc=False, is_async=True)
        dq = pair(dq_first, dq_rest, D1)
        ds = operands(ds, D0, D1, WARPS)
        dk = accumulate(ds, queries, dk)
        waited, weights = finish(len(k), dv + dq, weights)
        dv, dq = waited[: len(k)], waited[len(k) :]
        mbarrier.arrive(dout.empty.index(stage))
        tma_store_wait(0)  # the last step's part has been read
        dq_tile[0].reshape([BLOCK_M, D0]).store(dq[0])
        if D1 > 0:
            dq_tile[1].reshape([BLOCK_M, D1]).store(dq[1])
        fence_async_shared()
        tma_add(dq_descs[0], [RAGGED, end, RAGGED - end + row, column], dq_tile[0])
        if D1 > 0:
            tma_add(dq_descs[1], [RAGGED, end, RAGGED - end + row, column + D0], dq_tile[1])
    else:
        ds = operands(ds, D0, D1, WARPS)
        dk = accumulate(ds, queries, dk)
        dv, weights = finish(len(k), dv, weights)
        mbarrier.arrive(dout.empty.index(stage))
    dk, ds = finish(0, dk, ds)
    mbarrier.arrive(q.empty.index(stage))
    return dk, dv


@gluon.jit
def dq_zeros(ROWS: gl.constexpr, D: gl.constexpr):
    """Eight warps share the queries of dQ: each four half of the columns."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, D // 2, 16])
    return gl.zeros([ROWS, D], gl.float32, layout=layout)


@gluon.jit
def consume(
    q, k, v, dout, stats, ds_tile, dq_descs, dq_tile, dk_out, dv_out, walk, scale, scale_log2,
    PART: gl.constexpr, GROUP: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    BLOCK_M: gl.constexpr, KEYS: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr,
    FIELDS: gl.constexpr, RAGGED: gl.constexpr, WITH_DQ: gl.constexpr,
):  # fmt: skip
    """Gradients of ``KEYS`` keys of every tile of this program, and their part of dQ."""
    k_rows = matrix(entry(k.tile, PART), KEYS, D0, D1)
    v_rows = matrix(entry(v.tile, PART), KEYS, D0, D1)
    step = 0
    done = 0
    for turn in range(turns_of(walk)):
        head, first, count, q_start, diagonal, length = tile_of(walk, turn, FIELDS)
        if count > 0:
            begin, steps = query_steps(diagonal, length, BLOCK_M)
            mine = diagonal + PART * KEYS
            # The first query that sees each key; behind the segment no query does.
            keys = gl.arange(0, KEYS, layout=gl.SliceLayout(1, sums_layout(BLOCK_M, WARPS)))
            earliest = mine + keys
            # Steps whose first query sees the last key need no mask.
            partial = gl.maximum(mine + KEYS - 1 - begin + BLOCK_M - 1, 0) // BLOCK_M
            partial = gl.minimum(partial, steps)
            dk = zeros(KEYS, D0, D1, WARPS)
            dv = zeros(KEYS, D0, D1, WARPS)
            mbarrier.wait(k.full.index(0), done & 1)
            for member in range(GROUP):
                column = (head * GROUP + member) * (D0 + D1)
                for i in range(partial):
                    row = begin + i * BLOCK_M
                    dk, dv = gradient_step(
                        k_rows, v_rows, q, dout, stats, ds_tile, dq_descs, dq_tile, dk, dv,
                        q_start + row, q_start + length, column, earliest, row, step + i,
                        scale_log2, D0, D1, BLOCK_M, KEYS, WARPS, STAGES, RAGGED, WITH_DQ, True,
                    )  # fmt: skip
                for i in range(partial, steps):
                    row = begin + i * BLOCK_M
                    dk, dv = gradient_step(
                        k_rows, v_rows, q, dout, stats, ds_tile, dq_descs, dq_tile, dk, dv,
                        q_start + row, q_start + length, column, earliest, row, step + i,
                        scale_log2, D0, D1, BLOCK_M, KEYS, WARPS, STAGES, RAGGED, WITH_DQ, False,
                    )  # fmt: skip
                step += steps
            mbarrier.arrive(k.empty.index(0))
            done += 1
            row = first + PART * KEYS
            left = count - PART * KEYS
            store_rows(dk_out, row, left, head, walk.heads, times(dk, scale), KEYS, D0, D1, WARPS)
            store_rows(dv_out, row, left, head, walk.heads, dv, KEYS, D0, D1, WARPS)
    if WITH_DQ:
        tma_store_wait(0)  # shared memory is given back


@gluon.jit(do_not_specialize=["capacity", "tokens"])
def dkdv_sm90_kernel(
    q_desc, q_rest, k_desc, k_rest, v_desc, v_rest, dout_desc, dout_rest, dq_desc, dq_rest, dk, dv,
    lse, delta, tiles, capacity, key_heads, tokens, scale, scale_log2, GROUP: gl.constexpr,
    CONSUMERS: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, BLOCK_M: gl.constexpr,
    KEYS: gl.constexpr, STAGES: gl.constexpr, FIELDS: gl.constexpr, RAGGED: gl.constexpr,
    WITH_DQ: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Barriers and buffers; the work is in ``produce`` and ``consume``."""
    DTYPE: gl.constexpr = q_desc.dtype
    q_descs, k_descs = pair(q_desc, q_rest, D1), pair(k_desc, k_rest, D1)
    v_descs, dout_descs = pair(v_desc, v_rest, D1), pair(dout_desc, dout_rest, D1)
    dq_descs = pair(dq_desc, dq_rest, D1)
    k = make_ring(k_descs, KEYS, D0, D1, CONSUMERS, CONSUMERS)
    v = make_ring(v_descs, KEYS, D0, D1, CONSUMERS, CONSUMERS)
    q = make_ring(q_descs, BLOCK_M, D0, D1, STAGES, CONSUMERS)
    dout = make_ring(dout_descs, BLOCK_M, D0, D1, STAGES, CONSUMERS)
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lse_tile = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], ROWS)
    delta_tile = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], ROWS)
    full, empty = barriers(STAGES, CONSUMERS)
    stats = Ring((lse_tile, delta_tile), full, empty)
    ds_tile = k.tile[0]
    dq_tile = k.tile
    if WITH_DQ:
        TRANSPOSED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, BLOCK_M], DTYPE)
        ds_tile = gl.allocate_shared_memory(DTYPE, [KEYS, BLOCK_M], TRANSPOSED)
        dq_tile = entry(make_ring(dq_descs, BLOCK_M, D0, D1, 1, 1).tile, 0)
    walk = walk_over(tiles, capacity, key_heads, FIELDS)
    fence_async_shared()
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (consume, (q, k, v, dout, stats, ds_tile, dq_descs, dq_tile, dk, dv, walk, scale,
                           scale_log2, 0, GROUP, D0, D1, BLOCK_M, KEYS, 8, STAGES, FIELDS, RAGGED,
                           WITH_DQ)),
                (produce, (q_descs, k_descs, v_descs, dout_descs, q, k, v, dout, stats, lse, delta,
                           walk, tokens, GROUP, 1, D0, D1, BLOCK_M, KEYS, STAGES, FIELDS, RAGGED)),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (q, k, v, dout, stats, ds_tile, dq_descs, dq_tile, dk, dv, walk, scale,
                           scale_log2, 0, GROUP, D0, D1, BLOCK_M, KEYS, 4, STAGES, FIELDS, RAGGED,
                           WITH_DQ)),
                (consume, (q, k, v, dout, stats, ds_tile, dq_descs, dq_tile, dk, dv, walk, scale,
                           scale_log2, 1, GROUP, D0, D1, BLOCK_M, KEYS, 4, STAGES, FIELDS, RAGGED,
                           WITH_DQ)),
                (produce, (q_descs, k_descs, v_descs, dout_descs, q, k, v, dout, stats, lse, delta,
                           walk, tokens, GROUP, 2, D0, D1, BLOCK_M, KEYS, STAGES, FIELDS, RAGGED)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip


def key_gradients_sm90(
    saved: Saved,
    delta: Tensor,
    kv_tiles: Tensor,
    scale: float,
    programs: int,
    dq_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dK and dV; dQ / scale is added to ``dq_sum``.

    Args:
        saved: bfloat16 or float16, ``Dh`` 64, 96 or 128.
        delta: fp32 ``[Hq, Tq]`` of :func:`query_gradient_sm90` or :func:`delta_sm90`.
        kv_tiles: ``Tiles.kv_tiles`` made with 128 columns.
        scale: factor of the scores, positive.
        programs: programs to run, the GPU's multiprocessors.
        dq_sum: fp32 contiguous ``[Tq, Hq, Dh]``, or None for dK and dV alone.

    Returns:
        Gradients in the shapes and dtypes of k and v, contiguous.
    """
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in saved[1:3])
    q, k, v, dout = (with_adjacent_heads(x) for x in (saved.q, saved.k, saved.v, saved.dout))
    tokens, heads, size = q.shape
    key_heads = k.shape[1]
    consumers = 1 if dq_sum is not None else CONSUMERS[size]
    queries = descriptors(q, BLOCK_M)
    dkdv_sm90_kernel[(programs,)](
        *queries,
        *descriptors(k, KEYS // consumers),
        *descriptors(v, KEYS // consumers),
        *descriptors(dout, BLOCK_M),
        *(queries if dq_sum is None else descriptors(dq_sum, BLOCK_M)),
        dk,
        dv,
        saved.lse,
        delta,
        kv_tiles,
        len(kv_tiles),
        key_heads,
        tokens,
        scale,
        scale * 1.4426950408889634,
        GROUP=heads // key_heads,
        CONSUMERS=consumers,
        BLOCK_M=BLOCK_M,
        KEYS=KEYS // consumers,
        STAGES=STAGES,
        WITH_DQ=dq_sum is not None,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        **sizes(size),
        num_warps=8 // consumers,
        enable_fp_fusion=True,
    )
    return dk, dv
