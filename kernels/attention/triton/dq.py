"""dQ of document-masked attention: one program a query tile and head.

It also computes delta = sum(dO * O) - dLSE of its rows, which dK and dV need, so that no pass over
O and dO exists for it alone. dQ is accumulated in fp32 registers and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..saved import Saved
from ..tile_config import TileConfig
from .forward import (
    LOG2E,
    constants,
    key_bounds,
    load_parts,
    masked_step,
    product,
    store_parts,
    strides,
    tanh,
    tile_of,
    visible_keys,
    zero_parts,
)


@triton.jit
def probabilities(s, lse, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """exp(score - lse) from raw products, and the slope of the softcap; ``lse`` in base 2."""
    slope = 1.0
    factor = scale * LOG2E
    if HAS_SOFTCAP:
        s = tanh(s * (scale / softcap))
        slope = 1.0 - s * s
        factor = softcap * LOG2E
    return tl.math.exp2(s * factor - lse), slope


@triton.jit
def dq_step(
    dq0,
    dq1,
    q0,
    q1,
    do0,
    do1,
    lse,
    delta,
    k,
    v,
    k_row,
    v_row,
    k_start,
    n,
    end,
    diagonal,
    window,
    scale,
    softcap,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what keys ``n`` to ``n + BLOCK_N`` contribute to dQ / scale."""
    k0, k1 = load_parts(k, k_start + n, k_row, end - n, BLOCK_N, D0, D1, MASKED)
    v0, v1 = load_parts(v, k_start + n, v_row, end - n, BLOCK_N, D0, D1, MASKED)
    s = product(q0, q1, k0, k1, D1, PRECISION)  # [M, N]
    p, slope = probabilities(s, lse[:, None], scale, softcap, HAS_SOFTCAP)
    if MASKED:
        visible = visible_keys(diagonal, n, window, BLOCK_M, BLOCK_N, HAS_WINDOW)
        p = tl.where(visible, p, 0.0)
    dp = product(do0, do1, v0, v1, D1, PRECISION)
    ds = (p * (dp - delta[:, None]) * slope).to(k0.dtype)
    dq0 = tl.dot(ds, k0, dq0, input_precision=PRECISION)
    if D1 > 0:
        dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
    return dq0, dq1


@triton.jit(do_not_specialize=["tokens", "window"])
def dq_kernel(
    q,
    k,
    v,
    out,
    dout,
    lse,
    dlse,
    dq,
    delta,
    tiles,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    dout_row,
    dout_head,
    tokens,
    window,
    scale,
    softcap,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """dq [T, Hq, Dh] and delta [Hq, T] of one query tile and head."""
    head, first, rows, k_start, diagonal, _ = tile_of(tiles, HEADS, FIELDS)
    if rows == 0:
        return
    size: tl.constexpr = D0 + D1
    q += head * q_head
    k += head // GROUP * k_head
    v += head // GROUP * v_head
    dout += head * dout_head
    out += head * size
    dq += head * size
    q0, q1 = load_parts(q, first, q_row, rows, BLOCK_M, D0, D1, True)
    do0, do1 = load_parts(dout, first, dout_row, rows, BLOCK_M, D0, D1, True)
    o0, o1 = load_parts(out, first, HEADS * size, rows, BLOCK_M, D0, D1, True)
    dq0, dq1 = zero_parts(BLOCK_M, D0, D1)
    row_delta = tl.sum(o0.to(tl.float32) * do0.to(tl.float32), 1)
    if D1 > 0:
        row_delta += tl.sum(o1.to(tl.float32) * do1.to(tl.float32), 1)
    row = tl.arange(0, BLOCK_M)
    place = head * tokens + first + row
    row_lse = tl.load(lse + place, mask=row < rows, other=0.0)
    row_delta -= tl.load(dlse + place, mask=row < rows, other=0.0)
    # A row that sees no key has no gradient, whatever came from above.
    row_delta = tl.where(row_lse == -float("inf"), 0.0, row_delta)
    tl.store(delta + place, row_delta, mask=row < rows)
    row_lse *= LOG2E
    begin, full, partial, end, before, masked = key_bounds(
        diagonal, rows, window, HAS_WINDOW, BLOCK_N
    )
    for n in range(full, partial, BLOCK_N):
        dq0, dq1 = dq_step(
            dq0, dq1, q0, q1, do0, do1, row_lse, row_delta, k, v, k_row, v_row, k_start, n,
            end, diagonal, window, scale, softcap, D0, D1, BLOCK_M, BLOCK_N, HAS_WINDOW,
            HAS_SOFTCAP, False, PRECISION,
        )  # fmt: skip
    for i in tl.range(masked, num_stages=1):
        n = masked_step(i, begin, partial, before, BLOCK_N)
        dq0, dq1 = dq_step(
            dq0, dq1, q0, q1, do0, do1, row_lse, row_delta, k, v, k_row, v_row, k_start, n,
            end, diagonal, window, scale, softcap, D0, D1, BLOCK_M, BLOCK_N, HAS_WINDOW,
            HAS_SOFTCAP, True, PRECISION,
        )  # fmt: skip
    store_parts(dq, first, HEADS * size, rows, dq0 * scale, dq1 * scale, BLOCK_M, D0, D1)


def query_gradient(
    saved: Saved,
    q_tiles: Tensor,
    config: TileConfig,
    scale: float,
    window: int | None,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """dQ, and delta fp32 ``[Hq, Tq]``, which the gradients of the keys need."""
    q, k, v, out, lse, dout, dlse = saved
    heads = q.shape[1]
    dq, delta = torch.empty_like(q, memory_format=torch.contiguous_format), torch.empty_like(lse)
    dq_kernel[((len(q_tiles) - 1) * heads,)](
        q,
        k,
        v,
        out,
        dout,
        lse,
        dlse,
        dq,
        delta,
        q_tiles,
        *strides(q, k, v, dout),
        q.shape[0],
        window or 0,
        scale,
        softcap,
        HEADS=heads,
        BLOCK_M=config.q_tile,
        BLOCK_N=config.dq_step,
        num_warps=config.dq_warps,
        enable_fp_fusion=True,
        num_stages=config.dq_stages,
        **constants(q, k, window, softcap),
    )
    return dq, delta
