"""Chunked cross-entropy in plain PyTorch: the CPU path, and the middle rung of the oracle.

With logits ``r = x W^T + b``, ``z = softcap * tanh(r / softcap)`` (or ``z = r``), probabilities
``p = softmax(z)``, ``L = logsumexp(z)``, label smoothing ``e`` and z-loss ``q``, a row with target
``y`` and weight ``g`` contributes

    loss = g * (L - (1 - e) z_y - e mean(z) + q L^2)
    dz_j = g * (p_j (1 + 2 q L) - (1 - e) [j = y] - e / V)
    dr   = dz * (1 - (z / softcap)^2)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


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
    weight: Tensor | None  # [V, D] in at least fp32, added to
    bias: Tensor | None  # [V] in at least fp32, added to


def product_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` whose result is not rounded to half precision; float64 stays float64."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b, out_dtype=torch.float32)
    precision = torch.promote_types(a.dtype, torch.float32)
    return a.to(precision) @ b.to(precision)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in the precision of ``total`` (at least fp32), without a temporary."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weight: Tensor,
    options: Options,
    rows_per_chunk: int,
    gradients: Gradients | None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses, and gradients on the way where they are wanted.

    Args:
        hidden: ``[N, D]``.
        weight: ``[V, D]``; with ``group`` this rank's contiguous part of the vocabulary.
        bias: ``[V]`` or None.
        targets: int64 ``[N]``, indices into the whole vocabulary; any value where the row's weight
            is 0.
        row_weight: fp32 ``[N]``, factor of each row's loss and gradient.
        options: softcap, z-loss, label smoothing.
        rows_per_chunk: rows whose logits are held at a time.
        gradients: buffers to fill, or None for the loss alone.
        group: ranks that share the vocabulary, in order of their parts.

    Returns:
        ``[N]`` losses without ``row_weight`` and ``[N]`` log-sum-exps, in fp32 (float64 for float64
        inputs, which makes this its own oracle).
    """
    precision = torch.promote_types(hidden.dtype, torch.float32)
    losses = torch.empty(len(hidden), dtype=precision, device=hidden.device)
    lses = torch.empty_like(losses)
    part = 0 if group is None else dist.get_rank(group) * weight.shape[0]
    vocabulary = weight.shape[0] * (1 if group is None else dist.get_world_size(group))
    smoothing = options.label_smoothing
    if gradients is None and not weight.is_cuda:
        weight = weight.to(precision)  # once, not once a chunk
    for start in range(0, len(hidden), rows_per_chunk):
        rows = slice(start, start + rows_per_chunk)
        if gradients is None:  # a loss that is reported, not trained on, is worth the bytes
            logits = product_in_fp32(hidden[rows], weight.T)  # [C, V]
        else:
            logits = (hidden[rows] @ weight.T).to(precision)
        if bias is not None:
            logits += bias
        if options.softcap:
            logits.div_(options.softcap).tanh_().mul_(options.softcap)
        local = targets[rows] - part
        mine = (local >= 0) & (local < weight.shape[0])
        chosen = local.masked_fill(~mine, 0)[:, None]  # [C, 1]
        target_logit = logits.gather(1, chosen)[:, 0] * mine
        mean_logit = logits.sum(1) / vocabulary if smoothing else torch.zeros_like(target_logit)
        if group is None:
            lse = logits.logsumexp(1)
        else:
            highest = logits.amax(1)
            dist.all_reduce(highest, dist.ReduceOp.MAX, group)
            sums = torch.stack(((logits - highest[:, None]).exp().sum(1), target_logit, mean_logit))
            dist.all_reduce(sums, group=group)
            total, target_logit, mean_logit = sums
            lse = highest + total.log()
        loss = lse - (1 - smoothing) * target_logit - smoothing * mean_logit
        losses[rows] = loss + options.z_loss * lse.square()
        lses[rows] = lse
        if gradients is None:
            continue

        scale = row_weight[rows][:, None]  # [C, 1]
        slope = 1 - (logits / options.softcap).square() if options.softcap else None
        gradient = logits.sub_(lse[:, None]).exp_()  # p, [C, V]
        gradient *= scale * (1 + 2 * options.z_loss * lse[:, None])
        gradient.scatter_add_(1, chosen, -(1 - smoothing) * scale * mine[:, None])
        if smoothing:
            gradient -= scale * (smoothing / vocabulary)
        if slope is not None:
            gradient *= slope
        if gradients.bias is not None:
            gradients.bias.add_(gradient.sum(0))
        rounded = gradient.to(hidden.dtype)
        if gradients.hidden is not None:
            torch.mm(rounded, weight, out=gradients.hidden[rows])
        if gradients.weight is not None:
            add_product(gradients.weight, rounded.T, hidden[rows])
    if gradients is not None and gradients.hidden is not None and group is not None:
        dist.all_reduce(gradients.hidden, group=group)
    return losses, lses
