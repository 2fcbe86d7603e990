"""The LM head and the cross-entropy in one operation that never holds all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Logits held at a time: 8 MiB in fp32 on a CPU, about a core's share of its cache; 512 MiB on a
# GPU, enough rows to keep its matrix units busy with a vocabulary of 128k.
CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    denominator: Tensor | None = None,
) -> Tensor:
    """Summed cross-entropy of ``hidden @ weight.T`` divided by ``denominator``.

    The gradients are computed in the forward pass, chunk by chunk, and scaled in the backward pass.

    Args:
        hidden: ``[N, D]``.
        weight: ``[V, D]``, same dtype as ``hidden``.
        targets: int64 ``[N]``; rows with ``ignore_index`` count nothing.
        ignore_index: marks targets to leave out.
        denominator: scalar tensor; default the number of rows that count (at least 1).

    Returns:
        Scalar fp32 loss in nats, differentiable in ``hidden`` and ``weight``.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_shapes(hidden, weight, targets)
    if denominator is None:
        denominator = (targets != ignore_index).sum().clamp(min=1)
    return LinearCrossEntropy.apply(hidden, weight, targets, denominator, ignore_index)


@torch.no_grad()
def token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of every row, forward only.

    Args:
        hidden: ``[N, D]``.
        weight: ``[V, D]``.
        targets: int64 ``[N]``.
        ignore_index: rows with it have loss 0.

    Returns:
        fp32 ``[N]`` losses in nats and fp32 ``[N]`` log-sum-exps.
    """
    check_shapes(hidden, weight, targets)
    losses, lses = [], []
    for rows in row_chunks(hidden, weight):
        logits = (hidden[rows] @ weight.T).float()  # [C, V]
        lse = logits.logsumexp(-1)
        chosen = logits.gather(1, targets[rows].clamp(min=0)[:, None])[:, 0]
        losses.append((lse - chosen).masked_fill(targets[rows] == ignore_index, 0.0))
        lses.append(lse)
    empty = hidden.new_zeros(0, dtype=torch.float32)
    return torch.cat([empty, *losses]), torch.cat([empty, *lses])


class LinearCrossEntropy(torch.autograd.Function):
    """Chunked loss with both gradients in one pass over the rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        denominator: Tensor,
        ignore_index: int,
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        loss = hidden.new_zeros((), dtype=torch.float32)
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for rows in row_chunks(hidden, weight):
            logits = (hidden[rows] @ weight.T).float()  # [C, V]
            counts = targets[rows] != ignore_index
            chosen = targets[rows].masked_fill(~counts, 0)[:, None]
            lse = logits.logsumexp(-1)
            loss += ((lse - logits.gather(1, chosen)[:, 0]) * counts).sum()
            if not (wants_hidden or wants_weight):
                continue
            gradient = logits.sub_(lse[:, None]).exp_()  # softmax, [C, V]
            gradient.scatter_add_(1, chosen, gradient.new_full(chosen.shape, -1.0))
            gradient *= counts[:, None] / denominator
            gradient = gradient.to(hidden.dtype)
            if hidden_grad is not None:
                hidden_grad[rows] = gradient @ weight
            if weight_grad is not None:
                weight_grad += gradient.T @ hidden[rows]
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        return loss / denominator

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad * upstream.to(hidden_grad.dtype),
            None if weight_grad is None else (weight_grad * upstream).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def row_chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Slices of rows whose logits have at most ``CHUNK_ELEMENTS`` elements."""
    size = max(1, CHUNK_ELEMENTS[hidden.device.type] // weight.shape[0])
    return [slice(start, start + size) for start in range(0, hidden.shape[0], size)]


def check_shapes(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Raise ValueError naming the argument whose shape does not fit."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {[*hidden.shape]} and weight {[*weight.shape]} must be [N, D] and [V, D]"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets {[*targets.shape]} must have one entry a row of hidden {[*hidden.shape]}"
        )
