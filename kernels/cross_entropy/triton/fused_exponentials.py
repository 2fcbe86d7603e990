"""Logits and their exponentials in one Triton kernel (route B of the anchored loss).

The exponential is the epilogue of the matrix product, so logits are never rounded and the chunk is
written once instead of written, read and written. It pays only where Triton's product is fast
enough: the pass it saves is worth a share 367 / (D + 367) of the product's time on an H200, so the
product must reach D / (D + 367) of cuBLAS. ``benchmarks/cross_entropy.py`` measures that; until it
has been measured the loss does not use this kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .steps import logits_tile

BLOCK_N, BLOCK_V, BLOCK_D = 128, 128, 64


@triton.jit(do_not_specialize=["N", "TILES"])
def fused_exponential_kernel(
    hidden,
    weight,
    targets,
    anchor,
    logits,
    row_sums,
    overflow,
    N,
    V,
    TILES,
    D: tl.constexpr,
    SHIFT: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # one program a tile; blocks of rows change fastest, so a tile of the weight stays in L2
    """logits = exp(x W^T - anchor - SHIFT); row_sums[row, tile]; overflow[row] = 1 if too large."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.program_id(1)
    columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    present = rows < N
    inside = columns < V
    far = rows.to(tl.int64)
    z = logits_tile(hidden, weight, rows, columns, present, inside, D, BLOCK_N, BLOCK_V, BLOCK_D)
    shift = tl.load(anchor + rows, mask=present, other=float("inf")) + SHIFT
    target = tl.load(targets + rows, mask=present, other=-1)
    exponent = tl.where(inside[None, :], z - shift[:, None], -float("inf"))
    exponent = tl.where(columns[None, :] == target[:, None], -SHIFT, exponent)
    tl.store(overflow + rows, 1, mask=present & (tl.max(exponent, 1) > MAX_EXPONENT))
    e = tl.exp(tl.minimum(exponent, MAX_EXPONENT, propagate_nan=tl.PropagateNan.ALL))
    tl.store(
        logits + far[:, None] * V + columns[None, :],
        e.to(logits.dtype.element_ty),
        mask=present[:, None] & inside[None, :],
    )
    tl.store(row_sums + far * TILES + tile, tl.sum(e, 1), mask=present)


def fused_exponentials(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    anchor: Tensor,
    overflow: Tensor,
    shift: float,
    max_exponent: float,
) -> tuple[Tensor, Tensor]:
    """``E [C, V]`` in the inputs' dtype and its fp32 sums ``[C, tiles]``.

    Args:
        x: contiguous ``[C, D]``.
        weight: contiguous ``[V, D]``.
        targets: int64 ``[C]``, negative where there is none.
        anchor: fp32 ``[C]``, the target's logit.
        overflow: int32 ``[C]``, set to 1 where an exponent exceeded ``max_exponent``.
        shift: subtracted with the anchor.
        max_exponent: exponents are cut off here.
    """
    rows, depth = x.shape
    vocabulary = weight.shape[0]
    tiles = triton.cdiv(vocabulary, BLOCK_V)
    logits = x.new_empty(rows, vocabulary)
    row_sums = torch.empty(rows, tiles, dtype=torch.float32, device=x.device)
    fused_exponential_kernel[(triton.cdiv(rows, BLOCK_N), tiles)](
        x,
        weight,
        targets,
        anchor,
        logits,
        row_sums,
        overflow,
        rows,
        vocabulary,
        tiles,
        depth,
        shift,
        max_exponent,
        BLOCK_N,
        BLOCK_V,
        BLOCK_D,
        num_warps=8,
        num_stages=3,
        enable_fp_fusion=True,
    )
    return logits, row_sums
