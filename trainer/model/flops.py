"""Model FLOPs of a packed batch and the utilisation (MFU) they give.

Convention: causal, segment-masked attention pairs counted exactly; the LM head included;
recomputation excluded; the backward pass costs twice the forward pass (PaLM, 2204.02311, app. B).
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.config.schema import ModelConfig

# Dense bf16 peak in FLOP/s by a part of the device's name, from the makers' data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}


def attention_pairs(cu_seqlens: Tensor) -> int:
    """Unmasked (query, key) pairs of causal attention inside the segments ``cu_seqlens [S+1]``."""
    lengths = cu_seqlens.diff().to(torch.int64)
    return int((lengths * (lengths + 1) // 2).sum())


def training_flops(config: ModelConfig, tokens: int, pairs: int) -> int:
    """FLOPs of forward and backward over ``tokens`` with ``pairs`` attended pairs."""
    embeddings = 2 * config.vocab_size * config.hidden_size
    norms = (2 * config.num_layers + 1) * config.hidden_size
    matrices = config.parameter_count() - embeddings - norms
    head = config.vocab_size * config.hidden_size
    attention = config.num_layers * config.hidden_size * pairs
    return 6 * (matrices + head) * tokens + 12 * attention


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of a known GPU; None for others, so no figure is made up."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
