"""dQ for sm_90 in Gluon: one producer warp, two consumer warpgroups of 64 queries each.

A persistent kernel over the query tiles of ``tile_scheduler``. Q and dO of a tile stay in shared
memory while K and V stream by:

    wait S(i);  P;  wait dQ(i-1);  wait dP(i);  dS;  issue S(i+1) = Q K^T;  issue dQ += dS K;
    issue dP(i+1) = dO V^T

so that the exponentials of a step run during the last two products. It also writes delta =
sum(dO * O) - dLSE of its rows for the gradients of the keys. dQ is accumulated in fp32 registers
and written once. Everything streams through ragged descriptors: rows behind the last visible key
arrive as zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..saved import Saved
from ..tile_config import split
from .gluon_compat import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma_wait,
)
from .pipeline import (
    CONSUMER_REGISTERS,
    accumulate,
    descriptors,
    entry,
    finish,
    key_steps,
    make_ring,
    matrix,
    operands,
    pair,
    produce_keys,
    product,
    rows_layout,
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

BLOCK_N = {64: 128, 96: 64, 128: 64}  # keys a step
STAGES = 3  # steps of K and of V in shared memory; K is needed for two steps
DELTA_ROWS = 64  # rows of a program of ``delta_kernel``


@gluon.jit
def dot_of_rows(
    out, dout, dout_row, first, inside, stride, ROWS: gl.constexpr, D: gl.constexpr,
    TARGET: gl.constexpr,
):  # fmt: skip
    """sum(dO * O) of ``ROWS`` rows over one part of a head, fp32."""
    layout: gl.constexpr = rows_layout(D, 4)
    rows = (first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))).to(gl.int64)[:, None]
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, layout))[None, :]
    mask = gl.convert_layout(inside, gl.SliceLayout(1, layout))[:, None]
    o = gl.load(out + rows * stride + columns, mask=mask, other=0.0).to(gl.float32)
    do = gl.load(dout + rows * dout_row + columns, mask=mask, other=0.0).to(gl.float32)
    return gl.convert_layout(gl.sum(o * do, 1), TARGET)


@gluon.jit
def rows_of_softmax(
    out, dout, dout_row, dout_head, lse, dlse, first, count, head, heads, tokens,
    ROWS: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """lse, delta = sum(dO * O) - dLSE, their place in ``[Hq, Tq]`` and which exist, of rows of one
    head from ``first`` on."""
    rows = gl.arange(0, ROWS, layout=LAYOUT)
    inside = rows < count
    head = head.to(gl.int64)
    out += head * (D0 + D1)
    dout += head * dout_head
    stride = heads * (D0 + D1)
    delta = dot_of_rows(out, dout, dout_row, first, inside, stride, ROWS, D0, LAYOUT)
    if D1 > 0:
        delta += dot_of_rows(out + D0, dout + D0, dout_row, first, inside, stride, ROWS, D1, LAYOUT)
    stats = head * tokens + first + rows
    row_lse = gl.load(lse + stats, mask=inside, other=0.0)
    delta -= gl.load(dlse + stats, mask=inside, other=0.0)
    # A row that sees no key has no gradient, whatever came from above.
    return row_lse, gl.where(row_lse == float("-inf"), 0.0, delta), stats, inside


@gluon.jit
def gradient_step(
    q, dout, k, v, dq, ds, lse_log2, delta, limit, first_key, step, scale_log2, D0: gl.constexpr,
    D1: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, FIRST: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """dS of ring entry ``step``, while that of entry ``step - 1`` is applied to its K."""
    stage = step % STAGES
    before = (step - 1) % STAGES
    blank = gl.zeros([64, BLOCK_N], gl.float32, layout=sums_layout(BLOCK_N, 4))
    mbarrier.wait(k.full.index(stage), (step // STAGES) & 1)
    scores = product(q, matrix(entry(k.tile, stage), BLOCK_N, D0, D1), blank, False)
    if not FIRST:
        dq = accumulate(ds, matrix(entry(k.tile, before), BLOCK_N, D0, D1), dq)
    mbarrier.wait(v.full.index(stage), (step // STAGES) & 1)
    dp = product(dout, matrix(entry(v.tile, stage), BLOCK_N, D0, D1), blank, False)
    scores = warpgroup_mma_wait(len(q) if FIRST else 2 * len(q), deps=[scores])
    p = gl.exp2(scores * scale_log2 - lse_log2[:, None])
    if not FIRST:
        dq, ds = finish(len(q), dq, ds)
        mbarrier.arrive(k.empty.index(before))
    dp = warpgroup_mma_wait(0, deps=[dp])
    mbarrier.arrive(v.empty.index(stage))
    gradient = p * (dp - delta[:, None])
    if MASKED:  # not P: where a row sees nothing, dP may be anything
        layout: gl.constexpr = gl.SliceLayout(0, sums_layout(BLOCK_N, 4))
        keys = first_key + gl.arange(0, BLOCK_N, layout=layout)
        gradient = gl.where(keys[None, :] <= limit[:, None], gradient, 0.0)
    return dq, operands(gradient.to(k.tile[0].dtype), D0, D1, 4)


@gluon.jit
def consume(
    q, dout, k, v, o, do, dout_row, dout_head, lse, dlse, delta, dq_out, walk, tokens, scale,
    scale_log2, HALF: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, FIELDS: gl.constexpr,
):  # fmt: skip
    """dQ of 64 rows of every tile of this program; the rest is the other consumer's."""
    ROWS: gl.constexpr = gl.SliceLayout(1, sums_layout(BLOCK_N, 4))
    q_rows = matrix(entry(q.tile, HALF), 64, D0, D1)
    dout_rows = matrix(entry(dout.tile, HALF), 64, D0, D1)
    step = 0  # ring entries consumed so far
    done = 0  # query tiles so far
    for turn in range(turns_of(walk)):
        head, first, count, _k_start, diagonal, _length = tile_of(walk, turn, FIELDS)
        if count > 0:
            begin = HALF * 64
            row_lse, row_delta, stats, inside = rows_of_softmax(
                o, do, dout_row, dout_head, lse, dlse, first + begin, count - begin, head,
                walk.heads, tokens, 64, D0, D1, ROWS,
            )  # fmt: skip
            gl.store(delta + stats, row_delta, mask=inside)
            row_lse *= 1.4426950408889634  # log2(e)
            limit = diagonal + begin + gl.arange(0, 64, layout=ROWS)
            steps = key_steps(diagonal + count, BLOCK_N)
            # Steps whose last key the first row sees need no mask.
            plain = gl.minimum(gl.maximum(diagonal + begin + 1, 0) // BLOCK_N, steps - 1)
            dq = zeros(64, D0, D1, 4)
            mbarrier.wait(q.full.index(0), done & 1)
            dq, ds = gradient_step(
                q_rows, dout_rows, k, v, dq, (), row_lse, row_delta, limit, (steps - 1) * BLOCK_N,
                step, scale_log2, D0, D1, BLOCK_N, STAGES, True, True,
            )  # fmt: skip
            for i in range(1, steps - plain):
                dq, ds = gradient_step(
                    q_rows, dout_rows, k, v, dq, ds, row_lse, row_delta, limit,
                    (steps - 1 - i) * BLOCK_N, step + i, scale_log2, D0, D1, BLOCK_N, STAGES,
                    False, True,
                )  # fmt: skip
            for i in range(steps - plain, steps):
                dq, ds = gradient_step(
                    q_rows, dout_rows, k, v, dq, ds, row_lse, row_delta, limit,
                    (steps - 1 - i) * BLOCK_N, step + i, scale_log2, D0, D1, BLOCK_N, STAGES,
                    False, False,
                )  # fmt: skip
            mbarrier.arrive(q.empty.index(0))
            step += steps
            last = (step - 1) % STAGES
            keys = matrix(entry(k.tile, last), BLOCK_N, D0, D1)
            dq, ds = finish(0, accumulate(ds, keys, dq), ds)
            mbarrier.arrive(k.empty.index(last))
            done += 1
            store_rows(
                dq_out, first + begin, count - begin, head, walk.heads, times(dq, scale), 64, D0,
                D1, 4,
            )  # fmt: skip


@gluon.jit(do_not_specialize=["capacity", "tokens"])
def dq_sm90_kernel(
    q_desc, q_rest, k_desc, k_rest, v_desc, v_rest, dout_desc, dout_rest, out, dout, dout_row,
    dout_head, lse, dlse, delta, dq, tiles, capacity, heads, tokens, scale, scale_log2,
    GROUP: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, FIELDS: gl.constexpr, RAGGED: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Barriers and buffers; the work is in ``produce_keys`` and ``consume``."""
    q_descs, k_descs = pair(q_desc, q_rest, D1), pair(k_desc, k_rest, D1)
    v_descs, dout_descs = pair(v_desc, v_rest, D1), pair(dout_desc, dout_rest, D1)
    # Both halves of Q and of dO come and go together.
    q = make_ring(q_descs, 64, D0, D1, 2, 2)
    do = make_ring(dout_descs, 64, D0, D1, 2, 2)
    k = make_ring(k_descs, BLOCK_N, D0, D1, STAGES, 2)
    v = make_ring(v_descs, BLOCK_N, D0, D1, STAGES, 2)
    walk = walk_over(tiles, capacity, heads, FIELDS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (q, do, k, v, out, dout, dout_row, dout_head, lse, dlse, delta, dq, walk,
                       tokens, scale, scale_log2, 0, D0, D1, BLOCK_N, STAGES, FIELDS)),
            (consume, (q, do, k, v, out, dout, dout_row, dout_head, lse, dlse, delta, dq, walk,
                       tokens, scale, scale_log2, 1, D0, D1, BLOCK_N, STAGES, FIELDS)),
            (produce_keys, (q_descs, dout_descs, k_descs, v_descs, q, do, k, v, walk, True, GROUP,
                            D0, D1, BLOCK_N, STAGES, FIELDS, RAGGED)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@gluon.jit(do_not_specialize=["tokens"])
def delta_kernel(
    out, dout, dout_row, dout_head, lse, dlse, delta, heads, tokens, D0: gl.constexpr,
    D1: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """delta of ``ROWS`` rows of one head."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, rows_layout(D0, 4))
    head = gl.program_id(0) % heads
    first = gl.program_id(0) // heads * ROWS
    _, row_delta, stats, inside = rows_of_softmax(
        out, dout, dout_row, dout_head, lse, dlse, first, tokens - first, head, heads, tokens,
        ROWS, D0, D1, LAYOUT,
    )  # fmt: skip
    gl.store(delta + stats, row_delta, mask=inside)


def delta_sm90(saved: Saved) -> Tensor:
    """delta = sum(dO * O) - dLSE alone, fp32 ``[Hq, Tq]``."""
    tokens, heads, size = saved.out.shape
    delta = torch.empty_like(saved.lse)
    delta_kernel[((tokens + DELTA_ROWS - 1) // DELTA_ROWS * heads,)](
        saved.out,
        saved.dout,
        *saved.dout.stride()[:2],
        saved.lse,
        saved.dlse,
        delta,
        heads,
        tokens,
        **split(size),
        ROWS=DELTA_ROWS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return delta


def query_gradient_sm90(
    saved: Saved, q_tiles: Tensor, scale: float, programs: int
) -> tuple[Tensor, Tensor]:
    """dQ, and delta fp32 ``[Hq, Tq]``, which the gradients of the keys need.

    Args:
        saved: bfloat16 or float16, ``Dh`` 64, 96 or 128.
        q_tiles: ``Tiles.q_tiles`` made with 128 rows.
        scale: factor of the scores, positive.
        programs: programs to run, the GPU's multiprocessors.
    """
    dq = torch.empty_like(saved.q, memory_format=torch.contiguous_format)
    delta = torch.empty_like(saved.lse)
    q, k, v, dout = (with_adjacent_heads(x) for x in (saved.q, saved.k, saved.v, saved.dout))
    tokens, heads, size = q.shape
    block_n = BLOCK_N[size]
    dq_sm90_kernel[(programs,)](
        *descriptors(q, 64),
        *descriptors(k, block_n),
        *descriptors(v, block_n),
        *descriptors(dout, 64),
        saved.out,
        dout,
        *dout.stride()[:2],
        saved.lse,
        saved.dlse,
        delta,
        dq,
        q_tiles,
        len(q_tiles),
        heads,
        tokens,
        scale,
        scale * 1.4426950408889634,
        GROUP=heads // k.shape[1],
        BLOCK_N=block_n,
        STAGES=STAGES,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        **sizes(size),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return dq, delta
