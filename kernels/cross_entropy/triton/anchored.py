"""Fast mode of the fused loss on a GPU: three matrix products, no recomputation.

Every row is anchored at its target's logit instead of its maximum: with ``a = z_y`` and a constant
shift ``c``, one pass over a chunk of logits turns them in place into ``E = exp(z - a - c)`` and
sums them; no maximum has to be known first. Then

    L = a + c + log(sum E)        the log-sum-exp, so the loss is L - a
    p = E / sum E                 so both gradients are products with E, scaled by row

The target's own term is put in exactly, so that a rounded logit cannot push a loss below zero.
``E`` grows too large only where a token's loss exceeds about 80 nats. Such rows are found on the
device and done again from their inputs with the maximum as the anchor, by a kernel whose programs
end at once for all other rows; nothing waits for the host.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..chunked import add_product, aligned_product, finite_where_ignored, product_in_fp32
from .fused_exponentials import fused_exponentials

SHIFT = 30.0  # c: p below exp(-57) counts as 0
# Largest exponent that is not repaired. exp(88) is fp32's range, but E is also summed over the
# vocabulary and multiplied by W, and the sum's reciprocal multiplies x: all must stay in range.
MAX_EXPONENT = 50.0
BLOCK_V = 4096  # logits of one row that a program reads
REPAIR_BLOCK_V = 32  # logits that a repair computes at a time; more would spill registers


@triton.jit
def anchor_kernel(
    hidden, weight, targets, anchor, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # one program a row
    """anchor[i] = hidden[i] . weight[targets[i]] in fp32; +inf for a row without a target."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    total = 0.0
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = columns < D
        x = tl.load(hidden + row * D + columns, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + tl.maximum(target, 0) * D + columns, mask=inside, other=0.0).to(
            tl.float32
        )
        total += tl.sum(x * w)
    tl.store(anchor + row, tl.where(target < 0, float("inf"), total))


@triton.jit(do_not_specialize=["TILES"])
def exponential_kernel(
    logits,
    targets,
    anchor,
    row_sums,
    overflow,
    row_stride,
    V,
    TILES,
    SHIFT: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # one program a row and tile
    """logits -> exp(logits - anchor - SHIFT) in place; row_sums[row, tile]; overflow[row] = 1."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = columns < V
    place = logits + row * row_stride + columns
    z = tl.load(place, mask=inside, other=-float("inf")).to(tl.float32)
    exponent = z - tl.load(anchor + row) - SHIFT
    exponent = tl.where(columns == tl.load(targets + row), -SHIFT, exponent)
    if tl.max(exponent) > MAX_EXPONENT:
        tl.store(overflow + row, 1)
    e = tl.exp(tl.minimum(exponent, MAX_EXPONENT, propagate_nan=tl.PropagateNan.ALL))
    tl.store(place, e.to(logits.dtype.element_ty), mask=inside)
    tl.store(row_sums + row * TILES + tile, tl.sum(e))


@triton.jit(do_not_specialize=["TILES"])
def repair_kernel(
    hidden,
    weight,
    logits,
    anchor,
    row_sums,
    overflow,
    row_stride,
    V,
    TILES,
    D: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # one program a row; ends at once unless the row has overflowed
    """Compute an overflowed row again from its inputs, anchored at its maximum."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(overflow + row) == 0:
        return
    row_max = -float("inf")
    for step in range(2):  # first the maximum, then the exponentials
        total = 0.0
        for first in range(0, V, BLOCK_V):
            columns = first + tl.arange(0, BLOCK_V)
            inside = columns < V
            z = tl.zeros((BLOCK_V,), tl.float32)
            for start in range(0, D, BLOCK_D):
                depth = start + tl.arange(0, BLOCK_D)
                x = tl.load(hidden + row * D + depth, mask=depth < D, other=0.0)
                w = tl.load(
                    weight + columns[:, None].to(tl.int64) * D + depth[None, :],
                    mask=inside[:, None] & (depth < D)[None, :],
                    other=0.0,
                )
                z += tl.sum(w.to(tl.float32) * x.to(tl.float32)[None, :], 1)
            z = tl.where(inside, z, -float("inf"))
            if step == 0:
                row_max = tl.maximum(row_max, tl.max(z))
            else:
                e = tl.exp(z - row_max)
                place = logits + row * row_stride + columns
                tl.store(place, e.to(logits.dtype.element_ty), mask=inside)
                total += tl.sum(e)
        if step == 1:
            for tile in range(1, TILES):
                tl.store(row_sums + row * TILES + tile, 0.0)
            tl.store(row_sums + row * TILES, total)
            tl.store(anchor + row, row_max - SHIFT)


@triton.jit(do_not_specialize=["TILES"])
def finish_kernel(
    hidden,
    scaled,
    logits,
    targets,
    target_logit,
    anchor,
    row_sums,
    row_weight,
    row_scale,
    losses,
    lses,
    z_loss,
    row_stride,
    TILES,
    D: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # one program a row
    """Loss and scale of a row; its target's entry of E; its input times the scale.

    With g the row's weight, q = z_loss and S = sum E, the gradient of logit j is
    g (1 + 2 q L) / S * E_j, less g at the target. The factor before E_j is the row's scale, so the
    target's entry becomes E_y - S / (1 + 2 q L), computed before rounding.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    tiles = tl.arange(0, BLOCK_T)
    total = tl.sum(tl.load(row_sums + row * TILES + tiles, mask=tiles < TILES, other=0.0))
    target_z = tl.load(target_logit + row)
    shift = tl.load(anchor + row) + SHIFT
    counts = target >= 0
    lse = shift + tl.log(tl.where(counts, total, 1.0))
    loss = lse - target_z + z_loss * lse * lse
    tl.store(losses + row, tl.where(counts, loss, 0.0))
    tl.store(lses + row, lse)
    factor = 1.0 + 2.0 * z_loss * lse
    weight = tl.load(row_weight + row)
    scale = tl.where(counts & (weight != 0.0), weight * factor / total, 0.0)
    tl.store(row_scale + row, scale)
    if counts:
        own = tl.exp(target_z - shift) - total / factor
        tl.store(logits + row * row_stride + target, own.to(logits.dtype.element_ty))
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = columns < D
        x = tl.load(hidden + row * D + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(scaled + row * D + columns, (x * scale).to(scaled.dtype.element_ty), mask=inside)


def anchored_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor,
    z_loss: float,
    rows_per_chunk: int,
    hidden_grad: Tensor | None,
    weight_grad: Tensor | None,
    fused: bool = False,
) -> tuple[Tensor, Tensor]:
    """Losses and gradients of rows without bias, softcap and smoothing.

    Args:
        hidden: contiguous ``[N, D]`` in bf16 or fp32 (fp16 cannot hold ``E``).
        weight: contiguous ``[V, D]``.
        targets: int64 ``[N]``; negative where nothing is to be predicted.
        row_weight: fp32 ``[N]``, factor of each row's gradient.
        z_loss: factor of the squared log-sum-exp.
        rows_per_chunk: rows whose logits are held at a time.
        hidden_grad: ``[N, D]``, written, or None.
        weight_grad: fp32 ``[V, D]``, added to, or None.
        fused: take the exponentials in the product's own kernel, see
            ``kernels/cross_entropy/triton/fused_exponentials.py``.

    Returns:
        fp32 ``[N]`` losses without ``row_weight`` and fp32 ``[N]`` log-sum-exps.
    """
    rows, depth = hidden.shape
    vocabulary = weight.shape[0]
    block_d = min(1024, triton.next_power_of_2(depth))
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": hidden.device}
    # Each aligned by itself: Triton compiles again for an address that is not.
    losses, lses, anchor = (torch.empty(rows, **fp32) for _ in range(3))
    anchor_kernel[(rows,)](hidden, weight, targets, anchor, depth, block_d, enable_fp_fusion=True)
    target_logit = anchor.clone()  # a repaired row gets another anchor
    overflow = torch.zeros(rows, dtype=torch.int32, device=hidden.device)
    for start in range(0, rows, rows_per_chunk):
        part = slice(start, start + rows_per_chunk)
        x = finite_where_ignored(hidden[part], row_weight[part])
        count = x.shape[0]
        chunk = (targets[part], anchor[part], overflow[part])
        # E [C, V] and its sums [C, tiles]
        e, row_sums = exponentials(x, weight, *chunk, fused)
        tiles = row_sums.shape[1]
        scale = torch.empty(count, **fp32)
        scaled = torch.empty_like(x)
        repair_kernel[(count,)](
            x,
            weight,
            e,
            anchor[part],
            row_sums,
            overflow[part],
            e.stride(0),
            vocabulary,
            tiles,
            depth,
            SHIFT,
            REPAIR_BLOCK_V,
            min(128, block_d),
            enable_fp_fusion=True,
        )
        finish_kernel[(count,)](
            x,
            scaled,
            e,
            targets[part],
            target_logit[part],
            anchor[part],
            row_sums,
            row_weight[part],
            scale,
            losses[part],
            lses[part],
            z_loss,
            e.stride(0),
            tiles,
            depth,
            SHIFT,
            triton.next_power_of_2(tiles),
            block_d,
            enable_fp_fusion=True,
        )
        if hidden_grad is not None:
            hidden_grad[part] = product_in_fp32(e, weight) * scale[:, None]
        if weight_grad is not None:
            add_product(weight_grad, e.T, scaled)
    return losses, lses


def exponentials(
    x: Tensor, weight: Tensor, targets: Tensor, anchor: Tensor, overflow: Tensor, fused: bool
) -> tuple[Tensor, Tensor]:
    """``E [C, V]`` and its sums ``[C, tiles]``, by cuBLAS and a pass or by one kernel."""
    if fused:
        return fused_exponentials(x, weight, targets, anchor, overflow, SHIFT, MAX_EXPONENT)
    logits = aligned_product(x, weight)
    rows, vocabulary = logits.shape
    tiles = triton.cdiv(vocabulary, BLOCK_V)
    row_sums = torch.empty(rows, tiles, dtype=torch.float32, device=x.device)
    exponential_kernel[(rows, tiles)](
        logits,
        targets,
        anchor,
        row_sums,
        overflow,
        logits.stride(0),
        vocabulary,
        tiles,
        SHIFT,
        MAX_EXPONENT,
        BLOCK_V,
        enable_fp_fusion=True,
    )
    return logits, row_sums
