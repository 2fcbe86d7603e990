"""Averages of the weights along a run: smoother minima at the price of one more copy.

    ema   exponential moving average; its decay rises from 0.1 to the configured one, so that the
          random initialisation is soon forgotten
    swa   plain mean over the last steps (stochastic weight averaging, 1803.05407)

Training goes on with the weights themselves; evaluation and export see the average.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from trainer.config.schema import Averaging, OptimizerConfig


class WeightAverage:
    """A running average of a model's parameters, sharded as they are.

    ``state`` has the names of the model's state dict, fp32, and is stored in checkpoints.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, total_steps: int) -> None:
        self.kind = config.averaging
        self.decay = config.ema_decay
        self.first_step = int(total_steps * (1 - config.swa_fraction))
        live: dict[str, Any] = get_model_state_dict(model)
        self.live = [local(value) for value in live.values()]  # these share the parameters' memory
        self.state: dict[str, Tensor] = {
            name: value.detach().clone() for name, value in live.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step`` (counted from 0)."""
        if self.kind is Averaging.ema:
            share = 1 - min(self.decay, (1 + step) / (10 + step))
        else:
            share = 1 / max(1, step - self.first_step + 1)
        torch._foreach_lerp_(self.averages(), self.live, share)

    def averages(self) -> list[Tensor]:
        return [local(value) for value in self.state.values()]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the average's weights."""
        kept = [value.detach().clone() for value in self.live]
        torch._foreach_copy_(self.live, self.averages())
        try:
            yield
        finally:
            torch._foreach_copy_(self.live, kept)


def local(value: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value
