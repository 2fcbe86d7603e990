"""Next-token targets of a packed token axis."""

from __future__ import annotations

import torch
from torch import Tensor


def next_token_targets(input_ids: Tensor, cu_seqlens: Tensor, ignore_index: int = -100) -> Tensor:
    """The token that follows each token inside its own segment.

    Args:
        input_ids: int64 ``[T]``.
        cu_seqlens: int32 ``[S+1]`` segment borders; zero-length segments are allowed.
        ignore_index: target of the last token of every segment and of tokens after the last border.

    Returns:
        int64 ``[T]``. No host synchronisation, no data-dependent shapes.
    """
    targets = input_ids.roll(-1)
    is_last = torch.zeros(len(input_ids) + 1, dtype=torch.bool, device=input_ids.device)
    is_last[cu_seqlens.long()] = True  # border b marks token b - 1 as the last of its segment
    outside = torch.arange(len(input_ids), device=input_ids.device) >= cu_seqlens[-1]
    return targets.masked_fill(is_last[1:] | outside, ignore_index)
