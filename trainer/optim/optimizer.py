"""Optimisers, their groups and the schedules, pure functions of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from trainer.config.schema import (
    DecaySchedule,
    OptimizerConfig,
    OptimizerKind,
    RecipeConfig,
    ScheduleKind,
)


def build_optimizers(
    model: nn.Module, config: OptimizerConfig, recipe: RecipeConfig
) -> list[torch.optim.Optimizer]:
    """AdamW alone, or Muon for the matrices of the blocks and AdamW for everything else.

    Weight decay is decoupled and multiplied by the scheduled learning rate. The paper (2603.18534)
    exempts norms and input embeddings and decays the LM head. Muon's updates (Jordan et al. 2024)
    are scaled to the size of AdamW's (2502.16982), so both share one learning rate and decay.
    """
    hidden: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or ("embed_tokens" in name and not config.decay_embeddings):
            exempt.append(parameter)
        elif config.kind is OptimizerKind.muon and ".layers." in name:
            hidden.append(parameter)
        else:
            decayed.append(parameter)
    adamw = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": exempt, "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    if not hidden:
        return [adamw]
    muon = torch.optim.Muon(
        hidden,
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        momentum=config.muon_momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, adamw]


def set_schedules(
    optimizers: list[torch.optim.Optimizer],
    step: int,
    total_steps: int,
    config: OptimizerConfig,
    recipe: RecipeConfig,
) -> float:
    """Give every group the learning rate and weight decay of ``step``; returns the rate."""
    rate = learning_rate(step, total_steps, recipe.learning_rate, config)
    decay = weight_decay(step, total_steps, recipe.weight_decay, config)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
            if group["weight_decay"]:  # 0 marks what is exempt
                group["weight_decay"] = decay
    return rate


def learning_rate(step: int, total_steps: int, peak: float, config: OptimizerConfig) -> float:
    """Learning rate of ``step`` (counted from 0): linear warm-up, then cosine or WSD to the end."""
    warmup = int(config.warmup_fraction * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule is ScheduleKind.cosine:
        progress = (step - warmup) / max(1, total_steps - warmup)
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay = max(1, int(config.lr_decay_fraction * total_steps))
        shape = min(1.0, (total_steps - step) / decay)
    return peak * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)


def weight_decay(step: int, total_steps: int, peak: float, config: OptimizerConfig) -> float:
    """Weight decay of ``step`` (counted from 0): constant, or falling linearly to 0."""
    if config.weight_decay_schedule is DecaySchedule.constant:
        return peak
    return peak * (total_steps - step) / total_steps
