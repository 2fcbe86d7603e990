"""Quadratic attention in plain PyTorch: the oracle of every other backend, in any dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .sdpa import zeros_from


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Causal attention inside each segment, one segment after the other.

    Args:
        q: ``[Tq, Hq, Dh]``.
        k: ``[Tk, Hkv, Dh]``.
        v: ``[Tk, Hkv, Dh]``.
        cu_seqlens_q: int32 ``[S+1]``.
        cu_seqlens_k: int32 ``[S+1]``; the last query of a segment sees its last key.
        scale: factor of the scores before softmax.
        window: a query sees itself and the ``window - 1`` keys before it; None for all.
        softcap: scores become ``softcap * tanh(scores / softcap)``; 0 for none.

    Returns:
        Output ``[Tq, Hq, Dh]`` and log-sum-exp ``[Hq, Tq]``. Queries that see no key, and tokens
        after the last border, have output 0 and log-sum-exp -inf.
    """
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    outputs, lses = [], []
    borders = zip(
        cu_seqlens_q.tolist()[:-1],
        cu_seqlens_q.tolist()[1:],
        cu_seqlens_k.tolist()[:-1],
        cu_seqlens_k.tolist()[1:],
        strict=True,
    )
    covered = 0
    for q_start, q_end, k_start, k_end in borders:
        q_length, k_length = q_end - q_start, k_end - k_start
        covered = q_end
        if q_length == 0:
            continue
        queries = q[q_start:q_end].transpose(0, 1)  # [Hq, Lq, Dh]
        keys = k[k_start:k_end].transpose(0, 1).repeat_interleave(group, 0)  # [Hq, Lk, Dh]
        values = v[k_start:k_end].transpose(0, 1).repeat_interleave(group, 0)
        scores = queries @ keys.transpose(1, 2) * scale  # [Hq, Lq, Lk]
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        query_place = torch.arange(q_length, device=q.device)[:, None] + k_length - q_length
        key_place = torch.arange(k_length, device=q.device)[None]
        visible = key_place <= query_place
        if window is not None:
            visible &= key_place > query_place - window
        scores = scores.masked_fill(~visible, -math.inf)
        sees_any = visible.any(1)[None, :, None]
        # A row without keys would be NaN in the softmax and in its gradient.
        weights = scores.masked_fill(~sees_any, 0.0).softmax(-1)
        outputs.append((weights @ values * sees_any).transpose(0, 1))
        lses.append(torch.logsumexp(scores, -1))
    rest = q.shape[0] - covered
    outputs.append(zeros_from(q, k, v, covered))
    lses.append(q.new_full((heads, rest), -math.inf))
    return torch.cat(outputs), torch.cat(lses, 1)
