"""The loss against float64, with ignored rows that are not finite and one that overflows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cross_entropy.interface import linear_cross_entropy
from .verdicts import (
    ROUNDS,
    Choice,
    Verdict,
    cache_file,
    cached,
    choose,
    circumstances,
    distance,
    median_seconds,
    too_far,
)

LOSS_ROWS = 192
LOSSES = ("triton", "torch")

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, targets


def loss_verdicts(
    losses: Mapping[str, Loss],
    width: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    tokens: int,
    rounds: int = ROUNDS,
) -> list[Verdict]:
    """A verdict for every implementation of the loss.

    Args:
        losses: what to call, by name.
        width: of the hidden states.
        vocabulary: of the head.
        dtype: of both.
        device: where they are.
        tokens: rows of the timing.
        rounds: measurements of each.
    """
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": device}
    hidden = torch.randn(LOSS_ROWS, width, **options)
    hidden[3] *= 40  # a loss beyond what is computed without its maximum
    x, y = hidden.to(dtype), torch.randint(vocabulary, (LOSS_ROWS,), **options)
    y[::5] = -100
    weight = torch.randn(vocabulary, width, **options).mul_(width**-0.5).to(dtype)
    spoilt = x.masked_fill((y == -100)[:, None], float("nan"))  # such a row may hold anything
    plain = gradients(plain_loss, x, weight, y)
    exact = gradients(plain_loss, x.double(), weight.double(), y)
    failed = {}
    for name, loss in losses.items():
        failed[name] = loss_failure(loss, spoilt, weight, y, plain, exact)
    del plain, exact
    right = [name for name in losses if not failed[name]]
    seconds: dict[str, float] = {}
    if len(right) > 1:
        large = torch.randn(tokens, width, **options).to(dtype)
        wanted = torch.randint(vocabulary, (tokens,), **options)
        calls = {name: partial(gradients, losses[name], large, weight, wanted) for name in right}
        seconds, broken = median_seconds(calls, device, rounds)
        failed |= broken
    return [Verdict(name, failed[name], seconds.get(name)) for name in losses]


def loss_failure(
    loss: Loss,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    plain: tuple[Tensor, ...],
    exact: tuple[Tensor, ...],
) -> str:
    """What is wrong with a loss, or nothing."""
    try:
        first = gradients(loss, hidden, weight, targets)
        second = gradients(loss, hidden, weight, targets)
    except Exception as error:
        return f"raised {type(error).__name__}: {str(error).splitlines()[0][:200] or 'no message'}"
    for name, ours, again, theirs, right in zip(
        ("the loss", "the gradient of the hidden states", "the gradient of the head"),
        first,
        second,
        plain,
        exact,
        strict=True,
    ):
        if why := too_far(name, ours, right, distance(theirs, right)):
            return why
        if not torch.equal(ours, again):
            return f"{name} has other bits in the second run"
    return ""


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits at once, in at least fp32."""
    logits = hidden @ weight.T
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def gradients(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Loss and gradients of both inputs."""
    leaves = (hidden.detach().requires_grad_(), weight.detach().requires_grad_())
    value = loss(*leaves, targets)
    return (value.detach(), *torch.autograd.grad(value, leaves))


def loss_backends(device: torch.device, memory: str = "fast") -> dict[str, Loss]:
    """The implementations that can run here."""
    names = LOSSES if device.type == "cuda" else ("torch",)

    def make(name: Any) -> Loss:
        kept: Any = memory
        return lambda hidden, weight, targets: linear_cross_entropy(
            hidden, weight, targets, backend=name, memory=kept
        )

    return {name: make(name) for name in names}


def check_loss(
    width: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    tokens: int,
    memory: str = "fast",
    only: str | None = None,
    file: Path | None = None,
) -> Choice:
    """The loss of a run, likewise."""
    losses = loss_backends(device, memory)
    if only is not None:
        losses = {only: losses[only]}
    key = circumstances(device) | {
        "what": "loss",
        "shape": [tokens, width, vocabulary],
        "dtype": str(dtype),
        "memory": memory,
        "losses": list(losses),
    }
    verdicts = cached(
        key,
        lambda: loss_verdicts(losses, width, vocabulary, dtype, device, tokens),
        file or cache_file(),
    )
    return choose("loss", verdicts)
