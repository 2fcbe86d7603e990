"""dK and dV of document-masked attention: one program a key tile and key head.

It loops over the query heads of the group, so dK and dV are written once, in half precision, and
fp32 scratch, zero-filling, atomics and a last pass over the gradients do not exist.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..saved import Saved
from ..tile_config import TileConfig
from .dq import probabilities
from .forward import (
    LOG2E,
    constants,
    load_parts,
    loop_bounds,
    masked_step,
    product,
    store_parts,
    strides,
    tile_of,
    zero_parts,
)


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
    q0, q1 = load_parts(q, first, q_row, rest, BLOCK_M, D0, D1, MASKED)
    do0, do1 = load_parts(dout, first, dout_row, rest, BLOCK_M, D0, D1, MASKED)
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


@triton.jit(do_not_specialize=["tokens", "window"])
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
    """dk and dv [T, Hkv, Dh] of one key tile and key head."""
    key_head, first, keys, q_start, diagonal, q_length = tile_of(tiles, KEY_HEADS, FIELDS)
    if keys == 0:
        return
    size: tl.constexpr = D0 + D1
    k += key_head * k_head
    v += key_head * v_head
    dk += key_head * size
    dv += key_head * size
    k0, k1 = load_parts(k, first, k_row, keys, BLOCK_N, D0, D1, True)
    v0, v1 = load_parts(v, first, v_row, keys, BLOCK_N, D0, D1, True)
    dk0, dk1 = zero_parts(BLOCK_N, D0, D1)
    dv0, dv1 = zero_parts(BLOCK_N, D0, D1)
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
    row = KEY_HEADS * size
    store_parts(dk, first, row, keys, dk0 * scale, dk1 * scale, BLOCK_N, D0, D1)
    store_parts(dv, first, row, keys, dv0, dv1, BLOCK_N, D0, D1)


def key_gradients(
    saved: Saved,
    delta: Tensor,
    kv_tiles: Tensor,
    config: TileConfig,
    scale: float,
    window: int | None,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """dK and dV."""
    q, k, v, _out, lse, dout, _dlse = saved
    key_heads = k.shape[1]
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    dkdv_kernel[((len(kv_tiles) - 1) * key_heads,)](
        q,
        k,
        v,
        dout,
        lse,
        delta,
        dk,
        dv,
        kv_tiles,
        *strides(q, k, v, dout),
        q.shape[0],
        window or 0,
        scale,
        softcap,
        KEY_HEADS=key_heads,
        BLOCK_M=config.dkdv_step,
        BLOCK_N=config.kv_tile,
        num_warps=config.dkdv_warps,
        enable_fp_fusion=True,
        num_stages=config.dkdv_stages,
        **constants(q, k, window, softcap),
    )
    return dk, dv
