"""Tensors in, tensors out: document-masked attention and fused linear cross-entropy.

A library of its own: it knows nothing of data, models or configs. It imports torch and Triton, and
nothing of the other packages.
"""

from .attention.interface import varlen_attention
from .attention.op import attention_tiles
from .cross_entropy.interface import linear_cross_entropy, token_losses
from .targets import next_token_targets

__all__ = [
    "attention_tiles",
    "linear_cross_entropy",
    "next_token_targets",
    "token_losses",
    "varlen_attention",
]
