"""The CPU path: PyTorch's scaled-dot-product attention per segment, equal lengths in one batch."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


# The shapes of the batches depend on the borders.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def torch_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Causal attention inside each segment of a packed axis.

    Segments of one length make one batch of SDPA. The work is exact and differentiable; tokens
    after the last border have output 0 and gradient 0.

    Args:
        q: ``[T, Hq, Dh]``.
        k: ``[T, Hkv, Dh]``.
        v: ``[T, Hkv, Dh]``.
        cu_seqlens: int32 ``[S+1]`` on the CPU or, at the price of a synchronisation, on a GPU.
        scale: factor of the scores.

    Returns:
        ``[T, Hq, Dh]``.
    """
    groups, order, inverse = group_by_length(tuple(cu_seqlens.tolist()), q.shape[0])
    if order is not None:
        q, k, v = q[order], k[order], v[order]
    # One split has one concatenation as its backward; a slice would add to all of its input.
    sizes = [length * count for length, count in groups]
    covered = sum(sizes)
    parts = zip(*(x.split([*sizes, len(x) - covered]) for x in (q, k, v)), strict=True)
    outputs = []
    for (length, count), part in zip(groups, parts, strict=False):  # without the rest
        q_batch, k_batch, v_batch = (
            x.unflatten(0, (count, length)).transpose(1, 2) for x in part
        )  # [count, H, length, Dh]
        out = F.scaled_dot_product_attention(
            q_batch, k_batch, v_batch, is_causal=True, scale=scale, enable_gqa=True
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # [count * length, H, Dh]
    if covered < q.shape[0] or not outputs:
        outputs.append(zeros_from(q, k, v, covered))
    packed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return packed if inverse is None else packed[inverse]


def zeros_from(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """Output 0 and gradient 0 for the queries from ``start`` on: ``[Tq - start, Hq, Dh]``."""
    rest = q[start:, :, :1]
    zeros = rest.masked_fill(torch.ones_like(rest, dtype=torch.bool), 0).expand(-1, -1, v.shape[2])
    if start:
        return zeros
    # Nothing else reaches k and v, whose gradients other processes may be waiting for.
    return zeros + k[:0].sum() + v[:0].sum()


@functools.lru_cache(maxsize=8)  # every layer of a model asks for the same borders
def group_by_length(
    borders: tuple[int, ...], tokens: int
) -> tuple[list[tuple[int, int]], Tensor | None, Tensor | None]:
    """Segments sorted by length.

    Returns:
        ``(length, count)`` of every distinct length; the token order that brings equal lengths
        together and its inverse, int64 ``[tokens]``, or None where the order is already such.
    """
    starts = torch.tensor(borders[:-1])
    lengths = torch.tensor(borders[1:]) - starts
    by_length = lengths.argsort(stable=True)
    by_length = by_length[lengths[by_length] > 0]
    distinct, counts = lengths[by_length].unique_consecutive(return_counts=True)
    groups = list(zip(distinct.tolist(), counts.tolist(), strict=True))
    if torch.equal(by_length, by_length.sort().values):
        return groups, None, None
    pieces = [torch.arange(borders[i], borders[i + 1]) for i in by_length.tolist()]
    order = torch.cat([*pieces, torch.arange(borders[-1], tokens)])
    return groups, order, order.argsort()
