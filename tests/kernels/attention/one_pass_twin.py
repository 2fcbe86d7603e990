"""The sm_90 backward pass in one, written again in Triton: what the interpreter can run.

Tile by tile and step by step it does what ``kernels/attention/sm90/dkdv.py`` does: the same table,
the same steps and masks, sums in fp32, dQ added to memory by every tile. Copies, rings and barriers
are those of the model of the machine, registers those of the compiler.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.saved import Saved
from kernels.attention.sm90.dkdv import BLOCK_M, KEYS
from kernels.attention.tile_scheduler import FIELDS


@triton.jit
def rows_of(base, first, end, row_stride, ROWS: tl.constexpr, D: tl.constexpr):
    """``[ROWS, D]`` from row ``first`` on; rows from ``end`` on are 0."""
    rows = first + tl.arange(0, ROWS)
    place = rows[:, None] * row_stride + tl.arange(0, D)[None, :]
    return tl.load(base + place, mask=(rows < end)[:, None], other=0.0)


@triton.jit
def add_or_store_rows(
    base, first, end, row_stride, x, ROWS: tl.constexpr, D: tl.constexpr, ADD: tl.constexpr
):
    rows = first + tl.arange(0, ROWS)
    place = base + rows[:, None] * row_stride + tl.arange(0, D)[None, :]
    inside = tl.broadcast_to((rows < end)[:, None], (ROWS, D))
    if ADD:
        tl.atomic_add(place, x, mask=inside)
    else:
        tl.store(place, x, mask=inside)


@triton.jit
def twin_kernel(
    q, k, v, dout, dq_sum, dk, dv, lse, delta, tiles, tokens, scale, HEADS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, KEYS: tl.constexpr,
    FIELDS: tl.constexpr,
):  # fmt: skip
    """One key tile and key head; all tensors are contiguous fp32."""
    LOG2E: tl.constexpr = 1.4426950408889634
    key_heads: tl.constexpr = HEADS // GROUP
    head = tl.program_id(0) % key_heads
    tile = tiles + tl.program_id(0) // key_heads * FIELDS
    first, count = tl.load(tile), tl.load(tile + 1)
    q_start, diagonal, length = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    key_stride: tl.constexpr = key_heads * D
    keys = rows_of(k + head * D, first, first + count, key_stride, KEYS, D)
    values = rows_of(v + head * D, first, first + count, key_stride, KEYS, D)
    begin = tl.maximum(diagonal, 0)
    steps = tl.maximum(length - begin + BLOCK_M - 1, 0) // BLOCK_M
    partial = tl.maximum(diagonal + KEYS - 1 - begin + BLOCK_M - 1, 0) // BLOCK_M
    earliest = diagonal + tl.arange(0, KEYS)
    dk_sum = tl.zeros((KEYS, D), tl.float32)
    dv_sum = tl.zeros((KEYS, D), tl.float32)
    for member in range(GROUP):
        query_head = head * GROUP + member
        for i in range(steps):
            row = begin + i * BLOCK_M
            place = row + tl.arange(0, BLOCK_M)
            stats = query_head * tokens + q_start + place
            row_lse = tl.load(lse + stats, mask=place < length, other=0.0) * LOG2E
            row_delta = tl.load(delta + stats, mask=place < length, other=0.0)
            end = q_start + length
            queries = rows_of(q + query_head * D, q_start + row, end, HEADS * D, BLOCK_M, D)
            douts = rows_of(dout + query_head * D, q_start + row, end, HEADS * D, BLOCK_M, D)
            scores = tl.dot(keys, tl.trans(queries), input_precision="ieee")
            p = tl.exp2(scores * (scale * LOG2E) - row_lse[None, :])
            if i < partial:
                p = tl.where(place[None, :] >= earliest[:, None], p, 0.0)
            dv_sum += tl.dot(p, douts, input_precision="ieee")
            dp = tl.dot(values, tl.trans(douts), input_precision="ieee") - row_delta[None, :]
            ds = p * dp
            dk_sum += tl.dot(ds, queries, input_precision="ieee")
            dq = tl.dot(tl.trans(ds), keys, input_precision="ieee")
            add_or_store_rows(
                dq_sum + query_head * D, q_start + row, end, HEADS * D, dq, BLOCK_M, D, True
            )
    end = first + count
    add_or_store_rows(dk + head * D, first, end, key_stride, dk_sum * scale, KEYS, D, False)
    add_or_store_rows(dv + head * D, first, end, key_stride, dv_sum, KEYS, D, False)


def twin_backward(saved: Saved, kv_tiles: Tensor, scale: float) -> tuple[Tensor, ...]:
    """As ``attention_backward_sm90`` in one pass, of contiguous fp32 tensors."""
    q, k, v, out, lse, dout, dlse = saved
    tokens, heads, size = q.shape
    key_heads = k.shape[1]
    delta = torch.where(lse.isinf(), 0, (out * dout).sum(-1).T - dlse).contiguous()
    dq_sum, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
    twin_kernel[((len(kv_tiles) - 1) * key_heads,)](
        q,
        k,
        v,
        dout,
        dq_sum,
        dk,
        dv,
        lse,
        delta,
        kv_tiles,
        tokens,
        scale,
        HEADS=heads,
        GROUP=heads // key_heads,
        D=size,
        BLOCK_M=BLOCK_M,
        KEYS=KEYS,
        FIELDS=FIELDS,
    )
    return dq_sum * scale, dk, dv
