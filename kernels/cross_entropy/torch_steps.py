"""The chunks of the cross-entropy in plain PyTorch: the CPU path, and the oracle's middle rung.

The formulas are those of ``kernels/cross_entropy/chunked.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunked import Options, Steps, product_in_fp32


def capped_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, options: Options, exact: bool
) -> Tensor:
    """``[C, V]`` logits with bias and softcap in at least fp32."""
    if exact:
        logits = product_in_fp32(x, weight.T)
    else:
        logits = (x @ weight.T).to(torch.promote_types(x.dtype, torch.float32))
    if bias is not None:
        logits += bias
    if options.softcap:
        logits.div_(options.softcap).tanh_().mul_(options.softcap)
    return logits


def statistics(logits: Tensor, bias: Tensor | None, targets: Tensor, options: Options) -> Tensor:
    """``[4, C]``: maximum m, sum of exp(z - m), target logit or 0, sum of logits.

    Without a softcap exp(z - m) takes the logits' place, so that :func:`gradient` need not take the
    exponential again: it is the dearest thing here but the matrix products.
    """
    mine, column = own_targets(logits, targets)
    target_z = logits.gather(1, column)[:, 0] * mine
    total = logits.sum(1) if options.label_smoothing else torch.zeros_like(target_z)
    lowest = torch.finfo(logits.dtype).min  # for a part of the vocabulary that is all -inf
    row_max = logits.amax(1).clamp(min=lowest)
    below = row_max[:, None]
    shifted = logits - below if options.softcap else logits.sub_(below)
    return torch.stack((row_max, shifted.exp_().sum(1), target_z, total))


def gradient(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    row_weight: Tensor,
    options: Options,
    vocabulary: int,
    row_max: Tensor | None,
) -> Tensor:
    """``[C, V]`` gradient of the products ``x W^T``, in place of the logits."""
    mine, column = own_targets(logits, targets)
    scale = row_weight[:, None]  # [C, 1]
    smooth = options.label_smoothing
    slope = 1 - (logits / options.softcap).square() if options.softcap else None
    factor = scale * (1 + 2 * options.z_loss * lse[:, None])
    if row_max is None or options.softcap:
        result = logits.sub_(lse[:, None]).exp_()
    else:
        result, factor = logits, factor * (row_max - lse).exp()[:, None]
    result *= factor  # p (1 + 2 q L) g
    result.scatter_add_(1, column, (smooth - 1) * scale * mine[:, None])
    if smooth:
        result -= scale * (smooth / vocabulary)
    if slope is not None:
        result *= slope
    return result


def own_targets(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows have their target here ``[C]``, and its column or 0 ``[C, 1]``."""
    mine = (targets >= 0) & (targets < logits.shape[1])
    return mine, targets.masked_fill(~mine, 0)[:, None]


TORCH = Steps(capped_logits, statistics, gradient)
