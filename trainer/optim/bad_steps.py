"""What happens to a step whose gradient is not finite or far larger than usual."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from trainer.config.schema import BadStep, OptimizerConfig
from trainer.errors import NonFiniteLossError

logger = logging.getLogger(__name__)

WARM_UP = 20  # steps before there is a usual gradient
MOST_IN_A_ROW = 10  # skipped steps after which something else is wrong
MEMORY = 0.98  # of the running mean: about the last 50 steps


class StepGuard:
    """Judges every step by the norm of its gradient, which is the same on all ranks.

    Without ``optimizer.spike_factor`` and with ``optimizer.on_bad_step=stop`` it costs nothing:
    losses that are not finite are then noticed when the log is written. Otherwise the host waits
    for the norm in every step.

    ``usual`` (running mean of accepted norms), ``accepted``, ``skipped`` and ``in_a_row`` belong
    into a checkpoint, so that a resumed run judges and counts as an undisturbed one.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        usual: float = 0.0,
        accepted: int = 0,
        skipped: int = 0,
        in_a_row: int = 0,
    ) -> None:
        self.skips = config.on_bad_step is BadStep.skip
        self.factor = config.spike_factor
        self.usual = usual
        self.accepted = accepted
        self.skipped = skipped
        self.in_a_row = in_a_row

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, by the names of ``Progress``."""
        return {
            "usual_grad_norm": self.usual,
            "accepted_steps": self.accepted,
            "skipped_steps": self.skipped,
            "skipped_in_a_row": self.in_a_row,
        }

    def accepts(self, grad_norm: Tensor, blame: Callable[[str], str]) -> bool:
        """Whether the optimiser may take the step.

        Args:
            grad_norm: scalar, before clipping.
            blame: turns what is wrong into a message that names step and documents.

        Raises:
            NonFiniteLossError: the step is bad and is not to be skipped, or too many were.
        """
        if not self.skips and self.factor is None:
            return True
        norm = full_value(grad_norm)
        limit = math.inf
        if self.factor is not None and self.accepted >= WARM_UP:
            limit = self.factor * self.usual
        if math.isfinite(norm) and norm <= limit:
            weight = MEMORY if self.accepted >= WARM_UP else self.accepted / (self.accepted + 1)
            self.usual = weight * self.usual + (1 - weight) * norm
            self.accepted += 1
            self.in_a_row = 0
            return True
        message = blame(f"gradient has norm {norm:.4g} (usually {self.usual:.4g})")
        self.skipped += 1
        self.in_a_row += 1
        if not self.skips or self.in_a_row > MOST_IN_A_ROW:
            raise NonFiniteLossError(message)
        logger.info(f"skipped: {message}")
        return False


def full_value(norm: Tensor) -> float:
    """The number in a scalar that may be sharded."""
    full = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return float(full)
