"""Deterministic backward pass of document-masked attention in two kernels without atomics.

Splitting it costs seven products where one kernel that adds to dQ atomically needs five; in return
every gradient is accumulated in fp32 registers, written once, and bitwise the same in every run.
"""

from __future__ import annotations

from torch import Tensor

from ..saved import Saved
from ..tile_config import TileConfig
from .dkdv import key_gradients
from .dq import query_gradient


def attention_backward(
    saved: Saved,
    row_tiles: Tensor,
    column_tiles: Tensor,
    config: TileConfig,
    scale: float,
    window: int | None,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; bitwise the same in every run.

    Args:
        saved: of the forward pass.
        row_tiles: ``Tiles.rows``.
        column_tiles: ``Tiles.columns``.
        config: ``Tiles.config``.
        scale: factor of the scores.
        window: keys a query sees, itself included; None for all.
        softcap: 0 for none.

    Returns:
        Gradients in the inputs' shapes and dtypes, contiguous.
    """
    dq, delta = query_gradient(saved, row_tiles, config, scale, window, softcap)
    return dq, *key_gradients(saved, delta, column_tiles, config, scale, window, softcap)
