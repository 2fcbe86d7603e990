"""Tile tables: which block of which segment a program works on, the most expensive first.

The tables are made on the device from the segment borders alone, with a capacity that depends on
shapes only, so nothing waits for the host and nothing recompiles. One pair of tables serves every
layer and both passes of a batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .tile_config import TileConfig

FIELDS = 5  # of a tile: first, count, other_start, diagonal, other_length


class Tiles(NamedTuple):
    """The tables of one batch: int32 ``[N + 1, 5]`` each, and the sizes they were made for.

    The last row of a table is ``(used tiles, 0, ...)``: a tile of no tokens to those who read it as
    one, and the end of the loop for persistent programs.
    """

    q_tiles: Tensor
    kv_tiles: Tensor
    config: TileConfig


def make_tiles(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    tokens_q: int,
    tokens_k: int,
    config: TileConfig,
    window: int | None = None,
) -> Tiles:
    """Tables of a batch; no synchronisation.

    A tile is ``(first, count, other_start, diagonal, other_length)``. For a query tile: the
    absolute index of its first query, how many queries, where the segment's keys start, the last
    key the first query sees (counted from there, possibly negative), how many keys. For a key tile:
    the same with keys and queries exchanged, and the diagonal is the first query that sees the
    first key. Tokens after the last border form tiles that see nothing. Unused entries have count
    0.

    Args:
        cu_seqlens_q: int32 ``[S+1]``, starting at 0 and at most ``tokens_q``.
        cu_seqlens_k: int32 ``[S+1]``; causality is aligned at segment ends.
        tokens_q: queries on the packed axis.
        tokens_k: keys on the packed axis.
        config: sizes of the tiles.
        window: keys a query sees, itself included; None for all. It only changes the order.

    Raises:
        RuntimeError: a border beyond the tokens, on a GPU as a device-side assertion.
    """
    queries, keys = segments(cu_seqlens_q, tokens_q), segments(cu_seqlens_k, tokens_k)
    q_tiles = tile_table(*queries, *keys, tokens_q, config.q_tile, 1, window)
    kv_tiles = tile_table(*keys, *queries, tokens_k, config.kv_tile, -1, window)
    return Tiles(q_tiles, kv_tiles, config)


def segments(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Starts and lengths ``[S+1]``; the last segment holds the tokens after the last border.

    Borders beyond the axis stop the program, on a GPU without being waited for: the kernels would
    read and write there.
    """
    torch._assert_async(
        cu_seqlens[-1] <= tokens, f"the last segment border lies beyond the {tokens} tokens"
    )
    rest = tokens - cu_seqlens[-1:]
    return cu_seqlens, torch.cat([cu_seqlens.diff(), rest])


def tile_table(
    starts: Tensor,
    lengths: Tensor,
    other_starts: Tensor,
    other_lengths: Tensor,
    tokens: int,
    block: int,
    side: int,
    window: int | None,
) -> Tensor:
    """Blocks of all segments, int32 ``[tokens // block + S + 2, 5]``, longest loop first, and
    their number.

    Args:
        starts: first token of each segment on the tiled axis, ``[S+1]``.
        lengths: tokens of each segment there.
        other_starts: first token of each segment on the axis the kernel loops over.
        other_lengths: tokens of each segment there.
        tokens: length of the tiled axis.
        block: tokens of a tile.
        side: 1 for queries (they look back), -1 for keys (they are seen from later).
        window: keys a query sees; None for all.
    """
    count = len(lengths)
    blocks = (lengths + block - 1) // block
    ends = blocks.cumsum(0)
    index = torch.arange(tokens // block + count, device=starts.device)
    used = index < ends[-1]
    segment = torch.searchsorted(ends, index, right=True).clamp(max=count - 1)
    begin = (index - (ends - blocks)[segment]) * block  # inside the segment
    size = torch.where(used, (lengths[segment] - begin).clamp(max=block), 0)
    other = other_lengths[segment]
    diagonal = begin + other - lengths[segment]
    # Tokens after the last border see nothing and nobody sees them.
    rest = segment == count - 1
    other = torch.where(rest, 0, other)
    diagonal = torch.where(rest, -block, diagonal)
    if side > 0:
        last = diagonal + size
        first = torch.zeros_like(diagonal) if window is None else diagonal - window + 1
    else:
        last = other if window is None else diagonal + size + window - 1
        first = diagonal
    cost = torch.minimum(last, other) - first.clamp(min=0)
    order = torch.where(used, cost.clamp(min=0), -1).argsort(descending=True, stable=True)
    fields = (starts[segment] + begin, size, other_starts[segment], diagonal, other)
    summary = torch.nn.functional.pad(ends[-1:], (0, FIELDS - 1))[None]  # (used, 0, 0, 0, 0)
    return torch.cat((torch.stack(fields, 1)[order], summary)).to(torch.int32)
