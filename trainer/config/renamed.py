"""Keys that had another name before version 2 of the config."""

from __future__ import annotations

from typing import Any

RENAMED = {
    "data.seed": "data.order_seed",
    "recipe.base": "recipe.real_stream",
    "distillation.share": "distillation.alpha",
    "optimizer.clip_norm": "optimizer.max_grad_norm",
    "optimizer.decay_fraction": "optimizer.lr_decay_fraction",
    "optimizer.min_ratio": "optimizer.min_lr_ratio",
    "runtime.attention": "runtime.attention_backend",
    "runtime.loss": "runtime.loss_backend",
    "runtime.recompute": "runtime.activation_checkpointing",
    "runtime.threads": "runtime.num_threads",
    "tracking.evaluations": "tracking.num_evaluations",
    "tracking.checkpoints": "checkpoint.count",
    "tracking.keep_checkpoints": "checkpoint.keep",
}


def translated(stored: Any) -> Any:
    """A config read from a run folder with today's keys in place of the old ones."""
    for old, new in RENAMED.items():
        section, key = old.split(".")
        if isinstance(stored.get(section), dict) and key in stored[section]:
            new_section, new_key = new.split(".")
            stored.setdefault(new_section, {})[new_key] = stored[section].pop(key)
    return stored
