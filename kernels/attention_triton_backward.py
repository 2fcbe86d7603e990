"""Deterministic backward pass of document-masked attention in two kernels without atomics.

The first has one program a query tile and head: it computes delta = sum(dO * O), which the second
needs too, and dQ, accumulated in fp32 registers. The second has one program a key tile and
key head and loops over the query heads of the group, so dK and dV are written once, and fp32
scratch, zero-filling and a last pass over the gradients do not exist. Seven products instead of
five is the price.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_config import TileConfig
from kernels.attention_layout import FIELDS
from kernels.attention_triton import (
    LOG2E,
    load_tile,
    loop_bounds,
    masked_step,
    precision,
    product,
    row_bounds,
    split,
    store_tile,
    tanh,
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
    k0 = load_tile(k, k_start + n, k_row, end - n, BLOCK_N, 0, D0, MASKED)
    v0 = load_tile(v, k_start + n, v_row, end - n, BLOCK_N, 0, D0, MASKED)
    k1 = k0
    v1 = v0
    if D1 > 0:
        k1 = load_tile(k, k_start + n, k_row, end - n, BLOCK_N, D0, D1, MASKED)
        v1 = load_tile(v, k_start + n, v_row, end - n, BLOCK_N, D0, D1, MASKED)
    s = product(q0, q1, k0, k1, D1, PRECISION)  # [M, N]
    p, slope = probabilities(s, lse[:, None], scale, softcap, HAS_SOFTCAP)
    if MASKED:
        row = diagonal + tl.arange(0, BLOCK_M)[:, None]
        column = n + tl.arange(0, BLOCK_N)[None, :]
        visible = column <= row
        if HAS_WINDOW:
            visible = visible & (column > row - window)
        p = tl.where(visible, p, 0.0)
    dp = product(do0, do1, v0, v1, D1, PRECISION)
    ds = (p * (dp - delta[:, None]) * slope).to(k0.dtype)
    dq0 = tl.dot(ds, k0, dq0, input_precision=PRECISION)
    if D1 > 0:
        dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
    return dq0, dq1


@triton.jit
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
    """dq [T, Hq, Dh] and delta [Hq, T] of one row tile and head."""
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    tile = tiles + tl.program_id(0) // HEADS * FIELDS
    first = tl.load(tile)
    rows = tl.load(tile + 1)
    k_start = tl.load(tile + 2)
    diagonal = tl.load(tile + 3)
    if rows == 0:
        return
    size: tl.constexpr = D0 + D1
    q += head * q_head
    k += head // GROUP * k_head
    v += head // GROUP * v_head
    dout += head * dout_head
    out += head * size
    dq += head * size
    q0 = load_tile(q, first, q_row, rows, BLOCK_M, 0, D0, True)
    do0 = load_tile(dout, first, dout_row, rows, BLOCK_M, 0, D0, True)
    o0 = load_tile(out, first, HEADS * size, rows, BLOCK_M, 0, D0, True)
    row_delta = tl.sum(o0.to(tl.float32) * do0.to(tl.float32), 1)
    q1 = q0
    do1 = do0
    dq0 = tl.zeros((BLOCK_M, D0), tl.float32)
    dq1 = 0.0
    if D1 > 0:
        q1 = load_tile(q, first, q_row, rows, BLOCK_M, D0, D1, True)
        do1 = load_tile(dout, first, dout_row, rows, BLOCK_M, D0, D1, True)
        o1 = load_tile(out, first, HEADS * size, rows, BLOCK_M, D0, D1, True)
        row_delta += tl.sum(o1.to(tl.float32) * do1.to(tl.float32), 1)
        dq1 = tl.zeros((BLOCK_M, D1), tl.float32)
    row = tl.arange(0, BLOCK_M)
    place = head * tokens + first + row
    row_lse = tl.load(lse + place, mask=row < rows, other=0.0)
    row_delta -= tl.load(dlse + place, mask=row < rows, other=0.0)
    # A row that sees no key has no gradient, whatever came from above.
    row_delta = tl.where(row_lse == -float("inf"), 0.0, row_delta)
    tl.store(delta + place, row_delta, mask=row < rows)
    row_lse *= LOG2E
    begin, full, partial, end, before, masked = row_bounds(
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
    store_tile(dq, first, HEADS * size, rows, dq0 * scale, BLOCK_M, 0, D0)
    if D1 > 0:
        store_tile(dq, first, HEADS * size, rows, dq1 * scale, BLOCK_M, D0, D1)


@triton.jit
def dkdv_step(
    dk0,
    dk1,
    dv0,
    dv1,
    k0,
    k1,
    v0,
    v1,
    q,
    dout,
    lse,
    delta,
    q_row,
    dout_row,
    q_start,
    m,
    q_length,
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
    """Add what queries ``m`` to ``m + BLOCK_M`` of one head contribute to dK / scale and dV."""
    first = q_start + m
    rest = q_length - m
    q0 = load_tile(q, first, q_row, rest, BLOCK_M, 0, D0, MASKED)
    do0 = load_tile(dout, first, dout_row, rest, BLOCK_M, 0, D0, MASKED)
    q1 = q0
    do1 = do0
    if D1 > 0:
        q1 = load_tile(q, first, q_row, rest, BLOCK_M, D0, D1, MASKED)
        do1 = load_tile(dout, first, dout_row, rest, BLOCK_M, D0, D1, MASKED)
    row = tl.arange(0, BLOCK_M)
    if MASKED:
        row_lse = tl.load(lse + first + row, mask=row < rest, other=0.0)
        row_delta = tl.load(delta + first + row, mask=row < rest, other=0.0)
    else:
        row_lse = tl.load(lse + first + row)
        row_delta = tl.load(delta + first + row)
    s = product(k0, k1, q0, q1, D1, PRECISION)  # [N, M]
    p, slope = probabilities(s, (row_lse * LOG2E)[None, :], scale, softcap, HAS_SOFTCAP)
    if MASKED:
        query = m + row[None, :]
        earliest = diagonal + tl.arange(0, BLOCK_N)[:, None]
        visible = (query >= earliest) & (query < q_length)
        if HAS_WINDOW:
            visible = visible & (query < earliest + window)
        p = tl.where(visible, p, 0.0)
    dv0 = tl.dot(p.to(do0.dtype), do0, dv0, input_precision=PRECISION)
    if D1 > 0:
        dv1 = tl.dot(p.to(do0.dtype), do1, dv1, input_precision=PRECISION)
    dp = product(v0, v1, do0, do1, D1, PRECISION)
    ds = (p * (dp - row_delta[None, :]) * slope).to(q0.dtype)
    dk0 = tl.dot(ds, q0, dk0, input_precision=PRECISION)
    if D1 > 0:
        dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
    return dk0, dk1, dv0, dv1


@triton.jit
def dkdv_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dk,
    dv,
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
    KEY_HEADS: tl.constexpr,
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
    """dk and dv [T, Hkv, Dh] of one column tile and key head."""
    key_head = (tl.program_id(0) % KEY_HEADS).to(tl.int64)
    tile = tiles + tl.program_id(0) // KEY_HEADS * FIELDS
    first = tl.load(tile)
    keys = tl.load(tile + 1)
    q_start = tl.load(tile + 2)
    diagonal = tl.load(tile + 3)
    q_length = tl.load(tile + 4)
    if keys == 0:
        return
    size: tl.constexpr = D0 + D1
    k += key_head * k_head
    v += key_head * v_head
    dk += key_head * size
    dv += key_head * size
    k0 = load_tile(k, first, k_row, keys, BLOCK_N, 0, D0, True)
    v0 = load_tile(v, first, v_row, keys, BLOCK_N, 0, D0, True)
    k1 = k0
    v1 = v0
    dk0 = tl.zeros((BLOCK_N, D0), tl.float32)
    dv0 = tl.zeros((BLOCK_N, D0), tl.float32)
    dk1 = 0.0
    dv1 = 0.0
    if D1 > 0:
        k1 = load_tile(k, first, k_row, keys, BLOCK_N, D0, D1, True)
        v1 = load_tile(v, first, v_row, keys, BLOCK_N, D0, D1, True)
        dk1 = tl.zeros((BLOCK_N, D1), tl.float32)
        dv1 = tl.zeros((BLOCK_N, D1), tl.float32)
    # Masked are the queries at the diagonal and where the segment or the window ends.
    begin = tl.maximum(0, diagonal)
    end = q_length
    limit = q_length
    if HAS_WINDOW:
        end = tl.minimum(q_length, diagonal + keys + window - 1)
        limit = tl.minimum(q_length, diagonal + window)
    full, partial, before, masked = loop_bounds(begin, diagonal + keys - 1, limit, end, BLOCK_M)
    for member in range(GROUP):
        head = key_head * GROUP + member
        head_q = q + head * q_head
        head_dout = dout + head * dout_head
        head_lse = lse + head * tokens
        head_delta = delta + head * tokens
        for m in range(full, partial, BLOCK_M):
            dk0, dk1, dv0, dv1 = dkdv_step(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1, head_q, head_dout, head_lse, head_delta, q_row,
                dout_row, q_start, m, q_length, diagonal, window, scale, softcap, D0, D1, BLOCK_M,
                BLOCK_N, HAS_WINDOW, HAS_SOFTCAP, False, PRECISION,
            )  # fmt: skip
        for i in tl.range(masked, num_stages=1):
            m = masked_step(i, begin, partial, before, BLOCK_M)
            dk0, dk1, dv0, dv1 = dkdv_step(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1, head_q, head_dout, head_lse, head_delta, q_row,
                dout_row, q_start, m, q_length, diagonal, window, scale, softcap, D0, D1, BLOCK_M,
                BLOCK_N, HAS_WINDOW, HAS_SOFTCAP, True, PRECISION,
            )  # fmt: skip
    store_tile(dk, first, KEY_HEADS * size, keys, dk0 * scale, BLOCK_N, 0, D0)
    store_tile(dv, first, KEY_HEADS * size, keys, dv0, BLOCK_N, 0, D0)
    if D1 > 0:
        store_tile(dk, first, KEY_HEADS * size, keys, dk1 * scale, BLOCK_N, D0, D1)
        store_tile(dv, first, KEY_HEADS * size, keys, dv1, BLOCK_N, D0, D1)


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    row_tiles: Tensor,
    column_tiles: Tensor,
    config: TileConfig,
    scale: float,
    window: int | None,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; bitwise the same in every run.

    Args:
        q: ``[Tq, Hq, Dh]``, last dimension contiguous, as in the forward pass.
        k: ``[Tk, Hkv, Dh]``.
        v: ``[Tk, Hkv, Dh]``.
        out: contiguous ``[Tq, Hq, Dh]``, the forward pass's output.
        lse: fp32 contiguous ``[Hq, Tq]``, its log-sum-exp.
        dout: ``[Tq, Hq, Dh]``, last dimension contiguous.
        dlse: fp32 contiguous ``[Hq, Tq]``.
        row_tiles: ``Tiles.rows``.
        column_tiles: ``Tiles.columns``.
        config: ``Tiles.config``.
        scale: factor of the scores.
        window: keys a query sees, itself included; None for all.
        softcap: 0 for none.

    Returns:
        Gradients in the inputs' shapes and dtypes, contiguous.
    """
    tokens, heads, size = q.shape
    key_heads = k.shape[1]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = torch.empty_like(lse)
    strides = [stride for x in (q, k, v, dout) for stride in x.stride()[:2]]
    numbers = (*strides, tokens, window or 0, scale, softcap)
    constants = {
        "GROUP": heads // key_heads,
        **split(size),
        "HAS_WINDOW": window is not None,
        "HAS_SOFTCAP": softcap != 0,
        "PRECISION": precision(q),
        "FIELDS": FIELDS,
    }
    dq_kernel[(len(row_tiles) * heads,)](
        q,
        k,
        v,
        out,
        dout,
        lse,
        dlse,
        dq,
        delta,
        row_tiles,
        *numbers,
        HEADS=heads,
        BLOCK_M=config.rows,
        BLOCK_N=config.dq_step,
        num_warps=config.dq_warps,
        num_stages=config.dq_stages,
        **constants,
    )
    dkdv_kernel[(len(column_tiles) * key_heads,)](
        q,
        k,
        v,
        dout,
        lse,
        delta,
        dk,
        dv,
        column_tiles,
        *numbers,
        KEY_HEADS=key_heads,
        BLOCK_M=config.dkdv_step,
        BLOCK_N=config.columns,
        num_warps=config.dkdv_warps,
        num_stages=config.dkdv_stages,
        **constants,
    )
    return dq, dk, dv
