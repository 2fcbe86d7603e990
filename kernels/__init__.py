"""Tensors in, tensors out: document-masked attention and fused linear cross-entropy."""

from kernels.attention import varlen_attention
from kernels.attention_op import attention_tiles
from kernels.cross_entropy import linear_cross_entropy, token_losses
from kernels.targets import next_token_targets

__all__ = [
    "attention_tiles",
    "linear_cross_entropy",
    "next_token_targets",
    "token_losses",
    "varlen_attention",
]
