"""FlashAttention through PyTorch's own ``varlen_attn`` (half precision on CUDA)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

# PyTorch 2.11 has fewer arguments than later versions.
HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """Causal attention inside each segment.

    The library leaves tokens after the last border unwritten, in the output as in the gradients, so
    both are replaced by 0 here; there is no synchronisation.

    Args:
        q: ``[T, Hq, Dh]``, float16 or bfloat16 on CUDA.
        k: ``[T, Hkv, Dh]``.
        v: ``[T, Hkv, Dh]``.
        cu_seqlens: int32 ``[S+1]``.
        max_seqlen: upper bound of the segment lengths.
        scale: factor of the scores.
        window: keys a query sees, itself included; None for all.
        cu_seqlens_k: borders of the keys where they differ; causality is aligned at segment ends.

    Returns:
        ``[T, Hq, Dh]``.
    """
    inside = (torch.arange(q.shape[0], device=q.device) < cu_seqlens[-1])[:, None, None]
    borders_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    inside_k = (torch.arange(k.shape[0], device=k.device) < borders_k[-1])[:, None, None]
    q, k, v = torch.where(inside, q, 0), torch.where(inside_k, k, 0), torch.where(inside_k, v, 0)
    if not HAS_GQA:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    options: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]} if HAS_GQA else {}
    left = -1 if window is None else window - 1
    out = varlen_attn(
        q,
        k,
        v,
        cu_seqlens,
        borders_k,
        max_seqlen,
        max_seqlen,
        scale=scale,
        window_size=(left, 0),
        **options,
    )
    assert isinstance(out, Tensor)  # without return_aux there is no log-sum-exp beside it
    return torch.where(inside, out, 0)
