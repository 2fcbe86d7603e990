"""Forward pass of document-masked attention: one program a query tile and head.

Online softmax in base 2 (FlashAttention, 2205.14135). A program finds its tile in the table of
``tile_scheduler``; its loop starts at the first key the tile sees and ends at the last, and only
the steps that cross the diagonal or the edge of the window compare positions. A head dimension
that is no power of two is the sum of two (96 = 64 + 32): each part is its own product, none padded.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tile_config import TileConfig, split
from ..tile_scheduler import FIELDS

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(
    base,
    first,
    stride,
    count,
    BLOCK: tl.constexpr,
    START: tl.constexpr,
    D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows ``first`` to ``first + BLOCK`` of a head: [BLOCK, D]; rows from ``count`` on are 0."""
    rows = tl.arange(0, BLOCK)
    # Only the scalar part can leave 32 bits; the tile's own offsets stay small.
    corner = base + first.to(tl.int64) * stride + START
    place = corner + rows[:, None] * stride + tl.arange(0, D)[None, :]
    if MASKED:
        return tl.load(place, mask=(rows < count)[:, None], other=0.0)
    return tl.load(place)


@triton.jit
def store_tile(
    base, first, stride, count, x, BLOCK: tl.constexpr, START: tl.constexpr, D: tl.constexpr
):
    """Write the first ``count`` rows of ``x [BLOCK, D]``."""
    rows = tl.arange(0, BLOCK)
    corner = base + first.to(tl.int64) * stride + START
    place = corner + rows[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(place, x.to(base.dtype.element_ty), mask=(rows < count)[:, None])


@triton.jit
def load_parts(
    base,
    first,
    stride,
    count,
    BLOCK: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Both parts of the head dimension, as :func:`load_tile`; the first twice where it is all."""
    x0 = load_tile(base, first, stride, count, BLOCK, 0, D0, MASKED)
    x1 = x0
    if D1 > 0:
        x1 = load_tile(base, first, stride, count, BLOCK, D0, D1, MASKED)
    return x0, x1


@triton.jit
def store_parts(
    base, first, stride, count, x0, x1, BLOCK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr
):
    """Write the first ``count`` rows of both parts."""
    store_tile(base, first, stride, count, x0, BLOCK, 0, D0)
    if D1 > 0:
        store_tile(base, first, stride, count, x1, BLOCK, D0, D1)


@triton.jit
def zero_parts(BLOCK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Sums to begin with; a scalar for a part that is not there."""
    x0 = tl.zeros((BLOCK, D0), tl.float32)
    x1 = 0.0
    if D1 > 0:
        x1 = tl.zeros((BLOCK, D1), tl.float32)
    return x0, x1


@triton.jit
def tile_of(tiles, HEADS: tl.constexpr, FIELDS: tl.constexpr):
    """This program's head, and the fields of its tile; heads of a tile run side by side."""
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    tile = tiles + tl.program_id(0) // HEADS * FIELDS
    first = tl.load(tile)
    count = tl.load(tile + 1)
    other_start = tl.load(tile + 2)
    diagonal = tl.load(tile + 3)
    other_length = tl.load(tile + 4)
    return head, first, count, other_start, diagonal, other_length


@triton.jit
def tanh(x):
    """Through one exponential; its absolute error is a rounding of 1."""
    return 1.0 - 2.0 / (1.0 + tl.math.exp2(x * (2.0 * LOG2E)))


@triton.jit
def product(a0, a1, b0, b1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """``a @ b.T`` of two tiles held in one or two parts of the head dimension."""
    c = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if D1 > 0:
        c = tl.dot(a1, tl.trans(b1), c, input_precision=PRECISION)
    return c


@triton.jit
def visible_keys(
    diagonal, n, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr
):
    """Which of the keys from ``n`` on each row of a tile sees: [BLOCK_M, BLOCK_N]."""
    row = diagonal + tl.arange(0, BLOCK_M)[:, None]
    column = n + tl.arange(0, BLOCK_N)[None, :]
    visible = column <= row
    if HAS_WINDOW:
        visible = visible & (column > row - window)
    return visible


@triton.jit
def forward_step(
    acc0,
    acc1,
    row_max,
    row_sum,
    q0,
    q1,
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
    """Add keys ``n`` to ``n + BLOCK_N`` to the running softmax of the tile's rows."""
    k0, k1 = load_parts(k, k_start + n, k_row, end - n, BLOCK_N, D0, D1, MASKED)
    s = product(q0, q1, k0, k1, D1, PRECISION)  # [M, N]
    factor = scale * LOG2E
    if HAS_SOFTCAP:
        s = tanh(s * (scale / softcap))
        factor = softcap * LOG2E
    if MASKED:
        visible = visible_keys(diagonal, n, window, BLOCK_M, BLOCK_N, HAS_WINDOW)
        s = tl.where(visible, s, -float("inf"))
    new = tl.maximum(row_max, tl.max(s, 1) * factor)
    anchor = new
    if MASKED:  # a row that has seen no key yet
        anchor = tl.where(new == -float("inf"), 0.0, new)
    p = tl.math.exp2(s * factor - anchor[:, None])
    shrink = tl.math.exp2(row_max - anchor)
    row_sum = row_sum * shrink + tl.sum(p, 1)
    # Rows of other segments may hold what is not finite, and 0 * inf is not 0: they are not loaded.
    v0 = load_tile(v, k_start + n, v_row, end - n, BLOCK_N, 0, D0, MASKED)
    p = p.to(v0.dtype)
    acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision=PRECISION)
    if D1 > 0:
        v1 = load_tile(v, k_start + n, v_row, end - n, BLOCK_N, D0, D1, MASKED)
        acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision=PRECISION)
    return acc0, acc1, new, row_sum


@triton.jit
def loop_bounds(begin, full, limit, end, BLOCK: tl.constexpr):
    """Steps of a tile's loop: [full, partial) need no mask, ``masked`` others around them do.

    Args:
        begin: first position that anyone in the tile sees.
        full: everybody in the tile sees the positions from here, and
        limit: up to here.
        end: nobody sees positions from here on.

    Returns:
        ``full`` moved to the first step that starts there, ``partial``, how many of the masked
        steps lie before ``full``, and how many there are.
    """
    full = begin + tl.cdiv(tl.maximum(0, full - begin), BLOCK) * BLOCK
    partial = full + tl.maximum(0, limit - full) // BLOCK * BLOCK
    before = tl.cdiv(tl.maximum(0, tl.minimum(full, end) - begin), BLOCK)
    masked = before + tl.cdiv(tl.maximum(0, end - partial), BLOCK)
    return full, partial, before, masked


@triton.jit
def masked_step(i, begin, partial, before, BLOCK: tl.constexpr):
    """Where the i-th masked step starts."""
    return tl.where(i < before, begin + i * BLOCK, partial + (i - before) * BLOCK)


@triton.jit
def key_bounds(diagonal, rows, window, HAS_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys that a query tile visits: ``begin``, ``end`` and what ``loop_bounds`` says of them."""
    end = diagonal + rows
    begin = 0
    full = 0
    if HAS_WINDOW:
        begin = tl.maximum(0, diagonal - window + 1)
        full = end - window
    full, partial, before, masked = loop_bounds(begin, full, diagonal + 1, end, BLOCK_N)
    return begin, full, partial, end, before, masked


@triton.jit(do_not_specialize=["tokens", "window"])
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    tiles,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
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
    """out [T, Hq, Dh] and lse [Hq, T] of one query tile and head."""
    head, first, rows, k_start, diagonal, _ = tile_of(tiles, HEADS, FIELDS)
    if rows == 0:
        return
    q += head * q_head
    k += head // GROUP * k_head
    v += head // GROUP * v_head
    q0, q1 = load_parts(q, first, q_row, rows, BLOCK_M, D0, D1, True)
    acc0, acc1 = zero_parts(BLOCK_M, D0, D1)
    row_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    begin, full, partial, end, before, masked = key_bounds(
        diagonal, rows, window, HAS_WINDOW, BLOCK_N
    )
    for n in range(full, partial, BLOCK_N):
        acc0, acc1, row_max, row_sum = forward_step(
            acc0, acc1, row_max, row_sum, q0, q1, k, v, k_row, v_row, k_start, n, end, diagonal,
            window, scale, softcap, D0, D1, BLOCK_M, BLOCK_N, HAS_WINDOW, HAS_SOFTCAP, False,
            PRECISION,
        )  # fmt: skip
    for i in tl.range(masked, num_stages=1):
        n = masked_step(i, begin, partial, before, BLOCK_N)
        acc0, acc1, row_max, row_sum = forward_step(
            acc0, acc1, row_max, row_sum, q0, q1, k, v, k_row, v_row, k_start, n, end, diagonal,
            window, scale, softcap, D0, D1, BLOCK_M, BLOCK_N, HAS_WINDOW, HAS_SOFTCAP, True,
            PRECISION,
        )  # fmt: skip
    blind = row_sum == 0.0  # no key seen: output 0
    row_sum = tl.where(blind, 1.0, row_sum)
    divisor = 1.0 / row_sum
    out += head * (D0 + D1)
    out_row = HEADS * (D0 + D1)
    acc0 *= divisor[:, None]
    if D1 > 0:
        acc1 *= divisor[:, None]
    store_parts(out, first, out_row, rows, acc0, acc1, BLOCK_M, D0, D1)
    row = tl.arange(0, BLOCK_M)
    # -inf where no key was seen
    value = (row_max + tl.math.log2(row_sum)) * LN2
    tl.store(lse + head * tokens + first + row, value, mask=row < rows)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_tiles: Tensor,
    config: TileConfig,
    scale: float,
    window: int | None,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of causal attention inside each segment.

    Args:
        q: ``[Tq, Hq, Dh]``, last dimension contiguous; ``Dh`` a power of two from 16 on or the sum
            of two.
        k: ``[Tk, Hkv, Dh]``.
        v: ``[Tk, Hkv, Dh]``.
        q_tiles: ``Tiles.q_tiles``, int32 ``[N + 1, 5]``.
        config: ``Tiles.config``.
        scale: factor of the scores, positive.
        window: keys a query sees, itself included; None for all.
        softcap: scores become ``softcap * tanh(scores / softcap)``; 0 for none.

    Returns:
        ``[Tq, Hq, Dh]`` in q's dtype and fp32 ``[Hq, Tq]``; 0 and -inf where a query sees no key.
    """
    tokens, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    forward_kernel[((len(q_tiles) - 1) * heads,)](
        q,
        k,
        v,
        out,
        lse,
        q_tiles,
        *strides(q, k, v),
        tokens,
        window or 0,
        scale,
        softcap,
        HEADS=heads,
        BLOCK_M=config.q_tile,
        BLOCK_N=config.forward_step,
        **constants(q, k, window, softcap),
        num_warps=config.forward_warps,
        enable_fp_fusion=True,
        num_stages=config.forward_stages,
    )
    return out, lse


def strides(*tensors: Tensor) -> list[int]:
    """Row and head strides of each, in elements; the last dimension is contiguous."""
    return [stride for x in tensors for stride in x.stride()[:2]]


def constants(q: Tensor, k: Tensor, window: int | None, softcap: float) -> dict[str, Any]:
    """The compile-time constants that all three kernels have."""
    return {
        "GROUP": q.shape[1] // k.shape[1],
        **split(q.shape[2]),
        "HAS_WINDOW": window is not None,
        "HAS_SOFTCAP": softcap != 0,
        # For half precision the choice means nothing; fp32 is multiplied exactly.
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "FIELDS": FIELDS,
    }
