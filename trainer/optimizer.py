"""AdamW groups and the schedules, pure functions of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from trainer.config import OptimizerConfig, RecipeConfig, ScheduleKind


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, recipe: RecipeConfig
) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay on every matrix except the input embedding.

    The paper (2603.18534) exempts norms and input embeddings; the LM head is decayed. The decay is
    multiplied by the scheduled learning rate.
    """
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() >= 2 and "embed_tokens" not in name
        (decayed if matrix else exempt).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": exempt, "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def learning_rate(step: int, total_steps: int, peak: float, config: OptimizerConfig) -> float:
    """Learning rate of ``step`` (counted from 0): linear warm-up, then cosine or WSD to the end."""
    warmup = int(config.warmup_fraction * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule is ScheduleKind.cosine:
        progress = (step - warmup) / max(1, total_steps - warmup)
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay = max(1, int(config.decay_fraction * total_steps))
        shape = min(1.0, (total_steps - step) / decay)
    return peak * (config.min_ratio + (1 - config.min_ratio) * shape)
