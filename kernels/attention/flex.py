"""FlexAttention with a document mask: the portable peer, with window, softcap and log-sum-exp."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def document_block_mask(cu_seqlens: Tensor, tokens: int, window: int | None = None) -> BlockMask:
    """Block mask of causal attention inside each segment, for every layer of a batch.

    Args:
        cu_seqlens: int32 ``[S+1]``; tokens after the last border see each other.
        tokens: length of the packed axis.
        window: keys a query sees, itself included; None for all.
    """
    place = torch.arange(tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, place, right=True)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = (document[query] == document[key]) & (key <= query)
        return visible if window is None else visible & (key > query - window)

    make = block_mask_maker(cu_seqlens.is_cuda)
    mask: BlockMask = make(sees, None, None, tokens, tokens, device=cu_seqlens.device)
    return mask


def flex_document_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    block_mask: BlockMask | None = None,
) -> Tensor:
    """Causal attention inside each segment.

    Args:
        q: ``[T, Hq, Dh]``.
        k: ``[T, Hkv, Dh]``.
        v: ``[T, Hkv, Dh]``.
        cu_seqlens: int32 ``[S+1]``.
        scale: factor of the scores.
        window: keys a query sees, itself included; None for all.
        softcap: scores become ``softcap * tanh(scores / softcap)``; 0 for none.
        block_mask: of :func:`document_block_mask`, if it is at hand.

    Returns:
        ``[T, Hq, Dh]``; 0 with gradient 0 for tokens after the last border.
    """
    tokens = q.shape[0]
    if block_mask is None:
        block_mask = document_block_mask(cu_seqlens, tokens, window)
    inside = (torch.arange(tokens, device=q.device) < cu_seqlens[-1])[:, None, None]
    q, k, v = (torch.where(inside, x, 0).transpose(0, 1)[None] for x in (q, k, v))  # [1, H, T, Dh]
    # Uncompiled it makes the whole score matrix, which on a CPU is what tests want.
    out = fused_flex_attention(q.is_cuda)(
        q,
        k,
        v,
        score_mod=capped(softcap) if softcap else None,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=True,
    )
    return torch.where(inside, out[0].transpose(0, 1), 0)


@functools.cache
def fused_flex_attention(fused: bool) -> Any:
    """FlexAttention's fused kernels, or the function that makes the whole score matrix."""
    return torch.compile(flex_attention, dynamic=False) if fused else flex_attention


@functools.cache
def block_mask_maker(fused: bool) -> Any:
    """``create_block_mask``, which uncompiled holds a few bytes for every pair of tokens."""
    return torch.compile(create_block_mask) if fused else create_block_mask


@functools.cache
def capped(softcap: float) -> Callable[..., Tensor]:
    """One score_mod a softcap, so that nothing is compiled twice."""

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod
