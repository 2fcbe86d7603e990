"""Tile sizes of the Triton attention kernels per architecture, head dimension, group and length.

They are read from ``tile_configs.json``, which ``python -m benchmarks.tune_attention`` writes
on a GPU. Nothing is tuned while training.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

FILE = Path(__file__).with_name("tile_configs.json")
# architecture -> head dimension -> smallest group -> smallest max_seqlen -> fields of TileConfig
Configs = dict[str, dict[str, dict[str, dict[str, dict[str, int]]]]]
# smallest max_seqlen and fields of a TileConfig, ascending
Entries = tuple[tuple[int, tuple[int, ...]], ...]


class TileConfig(NamedTuple):
    """Tile sizes in tokens, warps and pipeline stages of the three kernels.

    ``q_tile`` is the query tile of the forward pass and of dQ, ``kv_tile`` the key tile of dK/dV:
    those the tile tables are made of. A ``step`` is what the loop inside a tile takes at a time.
    """

    q_tile: int
    kv_tile: int
    forward_step: int
    forward_warps: int
    forward_stages: int
    dq_step: int
    dq_warps: int
    dq_stages: int
    dkdv_step: int
    dkdv_warps: int
    dkdv_stages: int


def tile_config(device: torch.device, head_dim: int, group: int, max_seqlen: int) -> TileConfig:
    """The entry of a device: nearest head dimension above, nearest group size and length below.

    Args:
        device: a CUDA device, or the CPU for Triton's interpreter.
        head_dim: size of a head.
        group: query heads a key head.
        max_seqlen: bound of the segment lengths, known without asking the device. It may change
            from call to call of a compiled function, which then asks only where the entries part.

    Raises:
        ValueError: an architecture or a head dimension without an entry.
    """
    return config_for(entries_of(device, head_dim, group), max_seqlen)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def entries_of(device: torch.device, head_dim: int, group: int) -> Entries:
    """The entries of a device; a compiled function keeps them."""
    if device.type == "cuda":
        architecture = f"sm_{torch.cuda.get_device_capability(device)[0]}0"
    else:
        architecture = "interpreter"
    return find_entries(read_configs(), architecture, head_dim, group)


def config_for(entries: Entries, max_seqlen: int) -> TileConfig:
    """The entry with the largest length up to ``max_seqlen``, or the first."""
    chosen = entries[0][1]
    for smallest, entry in entries:
        if smallest <= max_seqlen:
            chosen = entry
    return TileConfig(*chosen)


def find_entries(configs: Configs, architecture: str, head_dim: int, group: int) -> Entries:
    """Look the entries up in the file's content; raises as :func:`tile_config` does."""
    if architecture not in configs:
        raise ValueError(
            f"no tiles for {architecture} in {FILE.name} (it has {', '.join(configs)}); "
            "run `python -m benchmarks.tune_attention` on that GPU or use another backend"
        )
    dims = [int(dim) for dim in configs[architecture] if int(dim) >= head_dim]
    if not dims:
        raise ValueError(
            f"no tiles for head dimension {head_dim} on {architecture} in {FILE.name} (up to "
            f"{max(map(int, configs[architecture]))}); use another backend"
        )
    groups = configs[architecture][str(min(dims))]
    lengths = groups[str(max(int(size) for size in groups if int(size) <= group))]
    return tuple(
        sorted((int(length), tuple(TileConfig(**entry))) for length, entry in lengths.items())
    )


@functools.cache
def read_configs() -> Configs:
    """The file's content."""
    content: Configs = json.loads(FILE.read_text())
    return content


def split(size: int) -> dict[str, int]:
    """The head dimension as one or two powers of two, each at least 16.

    Raises:
        ValueError: a head dimension that is no such sum.
    """
    first = 1 << (size.bit_length() - 1)
    rest = size - first
    if first < 16 or rest & (rest - 1) or 0 < rest < 16:
        raise ValueError(
            f"head dimension {size} is neither a power of two from 16 on nor the sum of two "
            "(as 96 = 64 + 32)"
        )
    return {"D0": first, "D1": rest}
