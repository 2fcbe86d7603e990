"""The chunks of the cross-entropy in Triton, with every option: the lean mode's, and the fast
mode's wherever the anchored kernels of ``kernels/cross_entropy/triton/anchored.py`` do not apply.

The formulas are those of ``kernels/cross_entropy/chunked.py``. The products are cuBLAS's, held in
the inputs' dtype and replaced by their gradients in place: two reads and one write of a chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..chunked import Options, Steps, raw_logits

BLOCK_V = 4096  # logits of one row that a program reads at a time


@triton.jit
def capped(raw, bias, columns, inside, softcap, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr):
    """Logits with bias and softcap in fp32; tanh by way of exp, which saturates at both ends."""
    z = raw.to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if CAPPED:
        z = softcap * (1.0 - 2.0 / (tl.exp(2.0 * z / softcap) + 1.0))
    return z


@triton.jit
def logits_tile(
    hidden,
    weight,
    rows,
    columns,
    present,
    inside,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``hidden[rows] @ weight[columns].T`` in fp32: [BLOCK_N, BLOCK_V], 0 outside the inputs."""
    depth = tl.arange(0, BLOCK_D)
    x_rows = hidden + rows[:, None].to(tl.int64) * D
    w_rows = weight + columns[None, :].to(tl.int64) * D
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, D, BLOCK_D):
        deep = start + depth < D
        x = tl.load(
            x_rows + start + depth[None, :], mask=present[:, None] & deep[None, :], other=0.0
        )  # [BLOCK_N, BLOCK_D]
        w = tl.load(
            w_rows + start + depth[:, None], mask=deep[:, None] & inside[None, :], other=0.0
        )  # [BLOCK_D, BLOCK_V]
        z = tl.dot(x, w, z, input_precision="ieee")
    return z


@triton.jit
def statistics_kernel(
    logits,
    bias,
    targets,
    row_max,
    row_sum,
    target_logit,
    total,
    softcap,
    row_stride,
    V,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Row maximum, sum of exponentials below it, target's logit and sum of all logits: ``[N]``.

    One program a row of ``logits [N, V]``; bias and softcap are applied as they are read.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    m = -float("inf")
    s = 0.0
    target_z = 0.0
    added = 0.0
    for first in range(0, V, BLOCK_V):
        columns = first + tl.arange(0, BLOCK_V)
        inside = columns < V
        raw = tl.load(logits + row * row_stride + columns, mask=inside, other=0.0)
        z = capped(raw, bias, columns, inside, softcap, HAS_BIAS, CAPPED)
        target_z += tl.sum(tl.where(inside & (columns == target), z, 0.0))
        added += tl.sum(tl.where(inside, z, 0.0))
        z = tl.where(inside, z, -float("inf"))
        new = tl.maximum(m, tl.max(z))
        s = s * tl.exp(m - new) + tl.sum(tl.exp(z - new))
        m = new
    tl.store(row_max + row, m)
    tl.store(row_sum + row, s)
    tl.store(target_logit + row, target_z)
    tl.store(total + row, added)


@triton.jit
def gradient_kernel(
    logits,
    bias,
    targets,
    lses,
    row_weight,
    softcap,
    z_loss,
    smoothing,
    even,
    row_stride,
    V,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Logits -> their gradient, in place; an ignored row gives zeros whatever it holds.

    One program a row and tile; ``even`` is ``smoothing`` over the size of the whole vocabulary.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = columns < V
    place = logits + row * row_stride + columns
    weight = tl.load(row_weight + row)
    lse = tl.load(lses + row)
    raw = tl.load(place, mask=inside, other=0.0)
    z = capped(raw, bias, columns, inside, softcap, HAS_BIAS, CAPPED)
    slope = tl.exp(z - lse) * (1.0 + 2.0 * z_loss * lse) - even
    slope -= tl.where(columns == tl.load(targets + row), 1.0 - smoothing, 0.0)
    if CAPPED:
        slope *= 1.0 - (z / softcap) * (z / softcap)
    slope = tl.where(weight == 0.0, 0.0, weight * slope)  # an ignored row may hold anything
    tl.store(place, slope.to(logits.dtype.element_ty), mask=inside)


def statistics(logits: Tensor, bias: Tensor | None, targets: Tensor, options: Options) -> Tensor:
    """``[4, C]`` fp32: maximum m, sum of exp(z - m), target logit or 0, sum of logits."""
    rows, size = logits.shape
    result = torch.empty(4, rows, dtype=torch.float32, device=logits.device)
    statistics_kernel[(rows,)](
        logits,
        logits if bias is None else bias.contiguous(),
        targets.contiguous(),
        *result,
        options.softcap,
        logits.stride(0),
        size,
        bias is not None,
        options.softcap > 0,
        BLOCK_V,
        enable_fp_fusion=True,
    )
    return result


def gradient(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    row_weight: Tensor,
    options: Options,
    vocabulary: int,
    _row_max: Tensor | None,
) -> Tensor:
    """``[C, V]`` gradient of the products, in place."""
    rows, size = logits.shape
    gradient_kernel[(rows, triton.cdiv(size, BLOCK_V))](
        logits,
        logits if bias is None else bias.contiguous(),
        targets.contiguous(),
        lse,
        row_weight,
        options.softcap,
        options.z_loss,
        options.label_smoothing,
        options.label_smoothing / vocabulary,
        logits.stride(0),
        size,
        bias is not None,
        options.softcap > 0,
        BLOCK_V,
        enable_fp_fusion=True,
    )
    return logits


TRITON = Steps(raw_logits, statistics, gradient)
