"""The chunks of the cross-entropy compiled by PyTorch: the GPU path without our own kernels.

The products stay in the inputs' dtype; each pass over a chunk of logits is one generated kernel
that computes in fp32. Two reads and two writes of a half-precision chunk take the place of the
twelve passes over fp32 that the same formulas take one operation at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .chunked import Options, Steps, raw_logits


def capped(raw: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    """Logits in at least fp32."""
    z = raw.to(torch.promote_types(raw.dtype, torch.float32))
    if bias is not None:
        z = z + bias
    return softcap * torch.tanh(z / softcap) if softcap else z


def statistics_of(
    logits: Tensor, bias: Tensor | None, targets: Tensor, softcap: float, wants_total: bool
) -> Tensor:
    """See ``Steps.statistics``."""
    z = capped(logits, bias, softcap)
    lowest = torch.finfo(z.dtype).min  # for a part of the vocabulary that is all -inf
    row_max = z.amax(1).clamp(min=lowest)
    row_sum = (z - row_max[:, None]).exp().sum(1)
    mine = (targets >= 0) & (targets < logits.shape[1])
    column = torch.where(mine, targets, 0)
    own_bias = None if bias is None else bias[column]
    target_z = capped(logits.gather(1, column[:, None])[:, 0], own_bias, softcap)
    total = z.sum(1) if wants_total else torch.zeros_like(row_sum)
    return torch.stack((row_max, row_sum, torch.where(mine, target_z, 0), total))


def gradient_of(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    row_weight: Tensor,
    softcap: float,
    z_loss: float,
    smoothing: float,
    even: float,
) -> Tensor:
    """See ``Steps.gradient``; in place. ``even`` is the smoothing of one entry."""
    z = capped(logits, bias, softcap)
    scale = row_weight[:, None]
    columns = torch.arange(logits.shape[1], device=logits.device)
    slope = (z - lse[:, None]).exp() * (1 + 2 * z_loss * lse[:, None]) - even
    slope = slope - torch.where(columns == targets[:, None], 1 - smoothing, 0)
    if softcap:
        slope = slope * (1 - (z / softcap).square())
    return logits.copy_(torch.where(scale != 0, slope * scale, 0))


@functools.cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function as generated kernels."""
    return torch.compile(function, fullgraph=True)


def statistics(logits: Tensor, bias: Tensor | None, targets: Tensor, options: Options) -> Tensor:
    return compiled(statistics_of)(
        logits, bias, targets, options.softcap, options.label_smoothing != 0
    )


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
    """``[C, V]`` gradient of the products, in place of the logits."""
    return compiled(gradient_of)(
        logits,
        bias,
        targets,
        lse,
        row_weight,
        options.softcap,
        options.z_loss,
        options.label_smoothing,
        options.label_smoothing / vocabulary,
    )


COMPILED = Steps(raw_logits, statistics, gradient)
