"""Forward attention for sm_90 in Gluon: one producer warp, two consumer warpgroups.

A persistent kernel over the query tiles of ``tile_scheduler``. The producer warp copies Q, K and V
tiles to shared memory with TMA; each consumer warpgroup owns 64 query rows and runs

    issue S(i) = Q K(i)^T;  issue O += P(i-1) V(i-1);  wait S(i);  softmax S(i);  wait O

so that the tensor cores work on a product while the softmax of other scores is computed. The
warpgroups take turns at issuing: the products of one run during the softmax of the other
(FlashAttention-3, 2407.08608, sections 3.1 and 3.2). Key tiles are visited from the diagonal
backwards; only those that the diagonal crosses are masked. Everything is read through ragged
descriptors: rows behind the last visible key arrive as zeros, so what other segments hold never
meets a product.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    barriers,
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
    scaled,
    sizes,
    store_rows,
    sums_layout,
    tile_of,
    turns_of,
    walk_over,
    with_adjacent_heads,
    zeros,
)

BLOCK_N = 128  # keys a step
STAGES = {64: 3, 96: 3, 128: 2}  # steps of K and of V in shared memory


@gluon.jit
def softmax_step(
    scores, row_max, row_sum, limit, first_key, scale_log2, BLOCK_N: gl.constexpr,
    MASKED: gl.constexpr,
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
        layout: gl.constexpr = gl.SliceLayout(0, sums_layout(BLOCK_N, 4))
        keys = first_key + gl.arange(0, BLOCK_N, layout=layout)
        scores = gl.where(keys[None, :] <= limit[:, None], scores, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(scores, 1) * scale_log2)
    anchor = new_max
    if MASKED:  # a row that has seen no key yet: exp2(-inf - -inf) would be NaN
        anchor = gl.where(new_max == float("-inf"), 0.0, new_max)
    weights = gl.exp2(scores * scale_log2 - anchor[:, None])
    rescale = gl.exp2(row_max - anchor)
    return weights, new_max, row_sum * rescale + gl.sum(weights, 1), rescale


@gluon.jit
def attend_step(
    q, k, v, order, output, weights, row_max, row_sum, limit, first_key, step, issued, scale_log2,
    HALF: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Scores of ring entry ``step`` while the weights of entry ``step - 1`` are applied to V."""
    stage = step % STAGES
    before = (step - 1) % STAGES
    blank = gl.zeros([64, BLOCK_N], gl.float32, layout=sums_layout(BLOCK_N, 4))
    mbarrier.wait(k.full.index(stage), (step // STAGES) & 1)
    mbarrier.wait(v.full.index(before), ((step - 1) // STAGES) & 1)
    mbarrier.wait(order.index(HALF), (issued + 1 - HALF) & 1)
    scores = product(q, matrix(entry(k.tile, stage), BLOCK_N, D0, D1), blank, False)
    output = accumulate(weights, matrix(entry(v.tile, before), BLOCK_N, D0, D1), output)
    mbarrier.arrive(order.index(1 - HALF))
    scores = warpgroup_mma_wait(len(output), deps=[scores])
    mbarrier.arrive(k.empty.index(stage))
    exponentials, row_max, row_sum, rescale = softmax_step(
        scores, row_max, row_sum, limit, first_key, scale_log2, BLOCK_N, MASKED
    )
    output, weights = finish(0, output, weights)
    mbarrier.arrive(v.empty.index(before))
    weights = operands(exponentials.to(k.tile[0].dtype), D0, D1, 4)
    return scaled(output, rescale, D0, D1, 4), weights, row_max, row_sum


@gluon.jit
def consume(
    q, k, v, order, out, lse, walk, tokens, scale_log2, HALF: gl.constexpr, D0: gl.constexpr,
    D1: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, FIELDS: gl.constexpr,
):  # fmt: skip
    """Attention of 64 rows of every tile of this program; the rest is the other consumer's."""
    SCORES: gl.constexpr = sums_layout(BLOCK_N, 4)
    DTYPE: gl.constexpr = k.tile[0].dtype
    q_rows = matrix(entry(q.tile, HALF), 64, D0, D1)
    step = 0  # ring entries consumed so far
    done = 0  # query tiles so far
    for turn in range(turns_of(walk)):
        head, first, count, _k_start, diagonal, _length = tile_of(walk, turn, FIELDS)
        if count > 0:
            steps = key_steps(diagonal + count, BLOCK_N)
            rows = HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
            limit = diagonal + rows
            # Steps whose last key the first row sees need no mask.
            seen_by_all = gl.maximum(diagonal + HALF * 64 + 1, 0) // BLOCK_N
            plain = gl.minimum(seen_by_all, steps - 1)
            row_max = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
            row_sum = gl.zeros([64], gl.float32, layout=gl.SliceLayout(1, SCORES))
            blank = gl.zeros([64, BLOCK_N], gl.float32, layout=SCORES)
            output = zeros(64, D0, D1, 4)

            mbarrier.wait(q.full.index(0), done & 1)
            mbarrier.wait(k.full.index(step % STAGES), (step // STAGES) & 1)
            keys = matrix(entry(k.tile, step % STAGES), BLOCK_N, D0, D1)
            scores = warpgroup_mma_wait(0, deps=[product(q_rows, keys, blank, False)])
            mbarrier.arrive(k.empty.index(step % STAGES))
            exponentials, row_max, row_sum, _ = softmax_step(
                scores, row_max, row_sum, limit, (steps - 1) * BLOCK_N, scale_log2, BLOCK_N, True
            )
            weights = operands(exponentials.to(DTYPE), D0, D1, 4)
            for i in range(1, steps - plain):
                output, weights, row_max, row_sum = attend_step(
                    q_rows, k, v, order, output, weights, row_max, row_sum, limit,
                    (steps - 1 - i) * BLOCK_N, step + i, step + i - 1 - done, scale_log2,
                    HALF, D0, D1, BLOCK_N, STAGES, True,
                )  # fmt: skip
            for i in range(steps - plain, steps):
                output, weights, row_max, row_sum = attend_step(
                    q_rows, k, v, order, output, weights, row_max, row_sum, limit,
                    (steps - 1 - i) * BLOCK_N, step + i, step + i - 1 - done, scale_log2,
                    HALF, D0, D1, BLOCK_N, STAGES, False,
                )  # fmt: skip
            mbarrier.arrive(q.empty.index(0))
            step += steps
            last = (step - 1) % STAGES
            mbarrier.wait(v.full.index(last), ((step - 1) // STAGES) & 1)
            values = matrix(entry(v.tile, last), BLOCK_N, D0, D1)
            output, weights = finish(0, accumulate(weights, values, output), weights)
            mbarrier.arrive(v.empty.index(last))
            done += 1

            seen = row_sum > 0
            factor = gl.where(seen, 1.0 / gl.where(seen, row_sum, 1.0), 0.0)
            # Natural logarithm from the base-2 sums: ln 2 = 0.6931...
            row_lse = (row_max + gl.log2(gl.where(seen, row_sum, 1.0))) * 0.6931471805599453
            gl.store(lse + head.to(gl.int64) * tokens + first + rows, row_lse, mask=rows < count)
            output = scaled(output, factor, D0, D1, 4)
            begin = HALF * 64
            store_rows(out, first + begin, count - begin, head, walk.heads, output, 64, D0, D1, 4)


@gluon.jit(do_not_specialize=["capacity", "tokens"])
def forward_sm90_kernel(
    q_desc, q_rest, k_desc, k_rest, v_desc, v_rest, out, lse, tiles, capacity, heads, tokens,
    scale_log2, GROUP: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, FIELDS: gl.constexpr, RAGGED: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Barriers and buffers; the work is in ``produce_keys`` and ``consume``."""
    q_descs, k_descs = pair(q_desc, q_rest, D1), pair(k_desc, k_rest, D1)
    v_descs = pair(v_desc, v_rest, D1)
    q = make_ring(q_descs, 64, D0, D1, 2, 2)  # both halves of a tile come and go together
    k = make_ring(k_descs, BLOCK_N, D0, D1, STAGES, 2)
    v = make_ring(v_descs, BLOCK_N, D0, D1, STAGES, 2)
    order, _ = barriers(2, 1)  # whose turn it is to issue products
    walk = walk_over(tiles, capacity, heads, FIELDS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (q, k, v, order, out, lse, walk, tokens, scale_log2, 0, D0, D1, BLOCK_N,
                       STAGES, FIELDS)),
            (consume, (q, k, v, order, out, lse, walk, tokens, scale_log2, 1, D0, D1, BLOCK_N,
                       STAGES, FIELDS)),
            (produce_keys, (q_descs, q_descs, k_descs, v_descs, q, q, k, v, walk, False, GROUP, D0,
                            D1, BLOCK_N, STAGES, FIELDS, RAGGED)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def attention_forward_sm90(
    q: Tensor, k: Tensor, v: Tensor, q_tiles: Tensor, scale: float, programs: int
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of causal attention inside each segment.

    Args:
        q: ``[Tq, Hq, Dh]``, bfloat16 or float16, ``Dh`` 64, 96 or 128, last dimension contiguous.
        k: ``[Tk, Hkv, Dh]``.
        v: ``[Tk, Hkv, Dh]``.
        q_tiles: ``Tiles.q_tiles`` made with 128 rows.
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
        *descriptors(q, 64),
        *descriptors(k, BLOCK_N),
        *descriptors(v, BLOCK_N),
        out,
        lse,
        q_tiles,
        len(q_tiles),
        heads,
        tokens,
        scale * 1.4426950408889634,
        GROUP=heads // k.shape[1],
        BLOCK_N=BLOCK_N,
        STAGES=STAGES[size],
        CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        **sizes(size),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out, lse
