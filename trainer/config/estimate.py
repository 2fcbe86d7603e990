"""The settings of ``estimate=true``: what a run or a corpus will cost, before a GPU is rented."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config.fields import setting

# Bytes that PyTorch sees and dense bf16 FLOP/s, from the makers' data sheets.
DEVICES: dict[str, tuple[float, float]] = {
    "a100-40gb": (42.3e9, 312e12),
    "a100-80gb": (85.1e9, 312e12),
    "h100-80gb": (85.0e9, 989e12),
    "h200-141gb": (150.7e9, 989e12),
    "b200-180gb": (191.5e9, 2250e12),
    "l40s-48gb": (47.6e9, 362e12),
    "rtx4090-24gb": (25.4e9, 165e12),
}


@dataclass
class TrainEstimate:
    """``train.py estimate=true``."""

    enabled: bool = setting(False, "Say what the run will cost instead of training.")
    device: str = setting("h100-80gb", "The GPU it would run on.", choices=tuple(DEVICES))
    num_gpus: int = setting(1, "GPUs of the run.", unit="GPUs", at_least=1)
    mfu: float | None = setting(
        None,
        "Share of the peak FLOP/s; null: as measured on that GPU, else 0.4, which is said.",
        above=0,
        at_most=1,
    )
