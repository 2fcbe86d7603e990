"""FlashAttention: PyTorch's own ``varlen_attn``, or the flash-attn package where installed."""

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


def flash_attn_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_seqlens_k: Tensor | None,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """The same through ``flash_attn.flash_attn_varlen_func``.

    Args:
        q: ``[Tq, Hq, Dh]``, float16 or bfloat16 on CUDA.
        k: ``[Tk, Hkv, Dh]``.
        v: ``[Tk, Hkv, Dh]``.
        cu_seqlens: int32 ``[S+1]``.
        max_seqlen: upper bound of the segment lengths, of queries and keys.
        cu_seqlens_k: borders of the keys where they differ.
        scale: factor of the scores.
        window: keys a query sees, itself included; None for all.
        softcap: 0 for none.

    Returns:
        ``[Tq, Hq, Dh]``.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise ValueError(
            "backend='flash_attn' needs the flash-attn package (pip install 'megadocs[gpu]'); "
            "use backend='flash' for PyTorch's own FlashAttention"
        ) from error
    keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    inside = (torch.arange(q.shape[0], device=q.device) < cu_seqlens[-1])[:, None, None]
    inside_k = (torch.arange(k.shape[0], device=q.device) < keys[-1])[:, None, None]
    out: Tensor = flash_attn_varlen_func(
        torch.where(inside, q, 0),
        torch.where(inside_k, k, 0),
        torch.where(inside_k, v, 0),
        cu_seqlens,
        keys,
        max_seqlen,
        max_seqlen,
        softmax_scale=scale,
        causal=True,
        window_size=(-1 if window is None else window - 1, 0),
        softcap=softcap,
    )
    return torch.where(inside, out, 0)
