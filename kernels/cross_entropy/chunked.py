"""Cross-entropy in sweeps over chunks of logits, whatever computes the chunks.

With logits ``r = x W^T + b``, ``z = softcap * tanh(r / softcap)`` (or ``z = r``), probabilities
``p = softmax(z)``, ``L = logsumexp(z)``, label smoothing ``e`` and z-loss ``q``, a row with target
``y`` and weight ``g`` contributes

    loss = g * (L - (1 - e) z_y - e mean(z) + q L^2)
    dz_j = g * (p_j (1 + 2 q L) - (1 - e) [j = y] - e / V)
    dr   = dz * (1 - (z / softcap)^2)

The sweep over tokens gives losses and dX. The weight's gradient is either added up on the way
(fast: three matrix products), or made by a second sweep over the vocabulary that computes the
logits again and writes each part of dW once (lean: four products, nothing of the weight's size but
dW itself).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

SLAB_BYTES = 16 << 20  # fp32 sums of the part of dW that the vocabulary sweep works on
SLAB_COLUMNS = 512  # fewer would starve the matrix product


@dataclass(frozen=True)
class Options:
    """What changes the loss; every default is off."""

    softcap: float = 0.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Gradients:
    """Which gradients are wanted, and where they are accumulated."""

    hidden: Tensor | None  # [N, D], written
    weight: Tensor | None  # [V, D], added to; at least fp32 unless lean
    bias: Tensor | None  # [V] in at least fp32, added to


class Steps(NamedTuple):
    """What a backend does with a chunk: C rows and V columns, perhaps not all the vocabulary.

    ``targets`` are columns of the chunk; any other value is a target that lies elsewhere.
    """

    # (x [C, D], weight [V, D], bias [V] or None, options, exact) -> logits [C, V]
    logits: Callable[[Tensor, Tensor, Tensor | None, Options, bool], Tensor]
    # (logits, bias, targets [C], options) -> [4, C]: m, sum of exp(z - m), z_y or 0, sum of z;
    # may leave what its gradient needs in the logits' place
    statistics: Callable[[Tensor, Tensor | None, Tensor, Options], Tensor]
    # (logits, bias, targets, L [C], g [C], options, V of all ranks, m if statistics has seen these
    # logits) -> dr [C, V]; logits are lost
    gradient: Callable[
        [Tensor, Tensor | None, Tensor, Tensor, Tensor, Options, int, Tensor | None], Tensor
    ]


def rows_of_chunk(chunk_elements: int, vocabulary: int) -> int:
    """Rows whose logits are held at a time: whole tiles of 128 where there is room for one."""
    rows = max(1, chunk_elements // vocabulary)
    return rows // 128 * 128 or rows


def aligned_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T [C, V]`` whose rows begin at multiples of 64 entries on a GPU.

    Other rows could be read and written one entry at a time only.
    """
    vocabulary = weight.shape[0]
    if not x.is_cuda or vocabulary % 64 == 0:
        return x @ weight.T
    rows = x.new_empty(len(x), -(-vocabulary // 64) * 64)[:, :vocabulary]
    return torch.mm(x, weight.T, out=rows)


def product_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` whose result is not rounded to half precision; float64 stays float64."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b, out_dtype=torch.float32)
    precision = torch.promote_types(a.dtype, torch.float32)
    return a.to(precision) @ b.to(precision)


def raw_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, options: Options, exact: bool
) -> Tensor:
    """``[C, V]`` products, for backends that add bias and softcap whenever they read them."""
    return product_in_fp32(x, weight.T) if exact else aligned_product(x, weight)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in the precision of ``total`` (at least fp32), without a temporary."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def sweep_tokens(
    steps: Steps,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weight: Tensor,
    options: Options,
    chunk_elements: int,
    gradients: Gradients | None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses, and gradients on the way where they are wanted.

    Args:
        steps: the backend.
        hidden: ``[N, D]``.
        weight: ``[V, D]``; with ``group`` this rank's contiguous part of the vocabulary.
        bias: ``[V]`` or None.
        targets: int64 ``[N]``, indices into the whole vocabulary; any value where the row's weight
            is 0.
        row_weight: fp32 ``[N]``, factor of each row's loss and gradient.
        options: softcap, z-loss, label smoothing.
        chunk_elements: logits held at a time (one row at least).
        gradients: buffers to fill, or None for the loss alone, from logits that are not rounded.
        group: ranks that share the vocabulary, in order of their parts.

    Returns:
        ``[N]`` losses without ``row_weight`` and ``[N]`` log-sum-exps, in fp32 (float64 for float64
        inputs, which makes this its own oracle).
    """
    precision = torch.promote_types(hidden.dtype, torch.float32)
    losses = torch.empty(len(hidden), dtype=precision, device=hidden.device)
    lses = torch.empty_like(losses)
    local, vocabulary = placed(targets, weight, group)
    if gradients is None and not weight.is_cuda:
        weight = weight.to(precision)  # once, not once a chunk
    rows_per_chunk = rows_of_chunk(chunk_elements, weight.shape[0])
    for start in range(0, len(hidden), rows_per_chunk):
        rows = slice(start, start + rows_per_chunk)
        x = hidden[rows]
        if gradients is not None:
            x = finite_where_ignored(x, row_weight[rows])
        logits = steps.logits(x, weight, bias, options, gradients is None)  # [C, V]
        statistics = steps.statistics(logits, bias, local[rows], options)
        lse, target_logit, total = combined(statistics, group)
        smooth = options.label_smoothing
        losses[rows] = lse - (1 - smooth) * target_logit - smooth / vocabulary * total
        losses[rows] += options.z_loss * lse.square()
        lses[rows] = lse
        if gradients is None:
            continue
        gradient = steps.gradient(
            logits, bias, local[rows], lse, row_weight[rows], options, vocabulary, statistics[0]
        )
        if gradients.bias is not None:
            gradients.bias.add_(gradient.sum(0, dtype=gradients.bias.dtype))
        gradient = gradient.to(hidden.dtype)
        if gradients.hidden is not None:
            torch.mm(gradient, weight, out=gradients.hidden[rows])
        if gradients.weight is not None:
            add_product(gradients.weight, gradient.T, x)
    if gradients is not None and gradients.hidden is not None and group is not None:
        dist.all_reduce(gradients.hidden, group=group)
    return losses, lses


def sweep_vocabulary(
    steps: Steps,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weight: Tensor,
    lses: Tensor,
    options: Options,
    chunk_elements: int,
    gradients: Gradients,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Add the gradients of weight and bias to their buffers, each entry once.

    Arguments are those of :func:`sweep_tokens`, with the log-sum-exps ``[N]`` that it returned.
    """
    precision = torch.promote_types(hidden.dtype, torch.float32)
    local, vocabulary = placed(targets, weight, group)
    widest = max(1, SLAB_BYTES // (4 * hidden.shape[1]))
    columns = min(widest, max(SLAB_COLUMNS, chunk_elements // max(1, len(hidden))))
    for first in range(0, weight.shape[0], columns):
        slab = slice(first, first + columns)
        part = weight[slab]
        part_bias = None if bias is None else bias[slab]
        total = torch.zeros_like(part, dtype=precision)
        rows_per_chunk = rows_of_chunk(chunk_elements, len(part))
        for start in range(0, len(hidden), rows_per_chunk):
            rows = slice(start, start + rows_per_chunk)
            x, place = finite_where_ignored(hidden[rows], row_weight[rows]), local[rows] - first
            logits = steps.logits(x, part, part_bias, options, False)  # [C, slab]
            gradient = steps.gradient(
                logits, part_bias, place, lses[rows], row_weight[rows], options, vocabulary, None
            )
            if gradients.bias is not None:
                gradients.bias[slab] += gradient.sum(0, dtype=gradients.bias.dtype)
            add_product(total, gradient.to(hidden.dtype).T, x)
        if gradients.weight is not None:
            gradients.weight[slab] += total


def finite_where_ignored(x: Tensor, row_weight: Tensor) -> Tensor:
    """``x [C, D]`` with 0 in rows of weight 0: NaN there would be NaN x 0 in every gradient."""
    return torch.where((row_weight != 0)[:, None], x, 0)


def placed(targets: Tensor, weight: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, int]:
    """The targets as rows of this rank's weight, and the size of the whole vocabulary."""
    if group is None:
        return targets, weight.shape[0]
    size = weight.shape[0]
    return targets - dist.get_rank(group) * size, size * dist.get_world_size(group)


def combined(statistics: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, target logit and sum of logits over the whole vocabulary, each ``[C]``."""
    row_max, sums = statistics[0], statistics[1:]
    if group is not None:
        own = row_max
        row_max = own.clone()
        dist.all_reduce(row_max, dist.ReduceOp.MAX, group)
        sums = torch.stack((sums[0] * (own - row_max).exp(), sums[1], sums[2]))
        dist.all_reduce(sums, group=group)
    return row_max + sums[0].log(), sums[1], sums[2]
