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
    q_tiles: Tensor,
    kv_tiles: Tensor,
    config: TileConfig,
    scale: float,
    window: int | None,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; bitwise the same in every run.

    Args:
        saved: of the forward pass.
        q_tiles: ``Tiles.q_tiles``.
        kv_tiles: ``Tiles.kv_tiles``.
        config: ``Tiles.config``.
        scale: factor of the scores.
        window: keys a query sees, itself included; None for all.
        softcap: 0 for none.

    Returns:
        Gradients in the inputs' shapes and dtypes, contiguous.
    """
    dq, delta = query_gradient(saved, q_tiles, config, scale, window, softcap)
    return dq, *key_gradients(saved, delta, kv_tiles, config, scale, window, softcap)
