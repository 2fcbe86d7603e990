"""Causal attention over a packed token axis in which a token sees only its own segment."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from kernels.attention_flash import flash_attention
from kernels.attention_reference import reference_attention
from kernels.attention_torch import torch_attention

Backend = Literal["auto", "flash", "torch", "reference"]


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    return_lse: Literal[False] = False,
    backend: Backend = "auto",
) -> Tensor: ...


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    return_lse: Literal[True],
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]: ...


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Document-masked causal attention.

    Args:
        q: ``[Tq, Hq, Dh]``.
        k: ``[Tk, Hkv, Dh]``; ``Hq`` is a multiple of ``Hkv`` (grouped-query attention).
        v: ``[Tk, Hkv, Dh]``.
        cu_seqlens: int32 ``[S+1]`` segment borders of the queries; zero-length segments allowed.
        max_seqlen: upper bound of the segment lengths.
        cu_seqlens_k: borders of the keys where they differ; causality is aligned at segment ends.
        scale: factor of the scores; default ``Dh ** -0.5``.
        window: sliding window in tokens, the query itself included; None for all.
        softcap: ``softcap * tanh(scores / softcap)``; 0 for none.
        return_lse: also return the log-sum-exp of the scores, fp32 ``[Hq, Tq]``, natural log.
        backend: ``flash`` (PyTorch's varlen_attn: half precision on CUDA), ``torch`` (SDPA per
            segment), ``reference`` (quadratic, every option, any dtype), or ``auto``: the first of
            these that can do what is asked.

    Returns:
        ``[Tq, Hq, Dh]``; 0 with gradient 0 for tokens after the last border.

    Raises:
        ValueError: shapes or options that do not fit, naming them.
    """
    check_shapes(q, k, v, cu_seqlens, cu_seqlens_k)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    flashable = softcap == 0 and not return_lse
    plain = flashable and cu_seqlens_k is None and window is None
    half = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
    if backend == "auto":
        backend = "flash" if half and flashable else "torch" if plain else "reference"
    if backend == "flash":
        if not (half and flashable):
            raise ValueError(
                f"backend='flash' needs float16 or bfloat16 on CUDA (got {q.dtype} on {q.device}) "
                "and has no softcap or return_lse; use backend='reference'"
            )
        return flash_attention(q, k, v, cu_seqlens, max_seqlen, scale, window, cu_seqlens_k)
    if backend == "torch":
        if not plain:
            raise ValueError(
                "backend='torch' has no cu_seqlens_k, window, softcap or return_lse; "
                "use backend='reference'"
            )
        return torch_attention(q, k, v, cu_seqlens, scale)
    if backend != "reference":
        raise ValueError(f"backend={backend!r} is not one of auto, flash, torch, reference")
    keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    out, lse = reference_attention(q, k, v, cu_seqlens, keys, scale, window, softcap)
    return (out, lse.float()) if return_lse else out


def check_shapes(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None
) -> None:
    """Raise ValueError naming the first argument whose shape does not fit the others."""
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ValueError(
            f"q, k, v must be [T, H, Dh], not {[*q.shape]}, {[*k.shape]}, {[*v.shape]}"
        )
    if k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q {[*q.shape]}, k {[*k.shape]}, v {[*v.shape]}: k and v must agree in tokens and "
            "heads, q and k in the head dimension"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    if cu_seqlens_k is None and q.shape[0] != k.shape[0]:
        raise ValueError(f"{q.shape[0]} query tokens and {k.shape[0]} key tokens need cu_seqlens_k")
    for name, borders in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        if borders is not None and (borders.dim() != 1 or len(borders) < 2):
            raise ValueError(f"{name} must be [S+1] with S >= 1, not {[*borders.shape]}")
