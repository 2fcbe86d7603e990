"""Segment borders as kernels are handed them: padded to few sizes, so that nothing recompiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least ``count``, and at least 1."""
    return 1 << max(0, count - 1).bit_length()


def padded_borders(borders: Sequence[int], limit: int) -> tuple[Tensor, int]:
    """As many segments as there are and the longest of them, both rounded up to a power of two.

    Attention pays for padding in memory and in empty blocks (cuDNN's backward pass holds segments x
    longest), a compiled step for every new size.

    Args:
        borders: 0 and the end of every segment.
        limit: what no segment is longer than.

    Returns:
        ``cu_seqlens`` int32 ``[S+1]``, the last border repeated, and ``max_seqlen``.
    """
    exact = torch.tensor(borders, dtype=torch.int32)
    longest = min(power_of_two(int(exact.diff().max())), limit)
    padding = power_of_two(len(exact) - 1) + 1 - len(exact)
    return torch.cat((exact, exact[-1:].expand(padding))), longest
