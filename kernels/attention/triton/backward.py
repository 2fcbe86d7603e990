"""Deterministic backward pass of document-masked attention in two kernels without atomics.

Splitting it costs seven products where one kernel that adds to dQ atomically needs five; in return
every gradient is accumulated in fp32 registers, written once, and bitwise the same in every run.
"""

from __future__ import annotations

from torch import Tensor

from ..tile_config import TileConfig
from .dkdv import key_gradients
from .dq import query_gradient


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    row_tiles: Tensor,
    column_tiles: Tensor,
    config: TileConfig,
    scale: float,
    window: int | None,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; bitwise the same in every run.

    Args:
        q: ``[Tq, Hq, Dh]``, last dimension contiguous, as in the forward pass.
        k: ``[Tk, Hkv, Dh]``.
        v: ``[Tk, Hkv, Dh]``.
        out: contiguous ``[Tq, Hq, Dh]``, the forward pass's output.
        lse: fp32 contiguous ``[Hq, Tq]``, its log-sum-exp.
        dout: ``[Tq, Hq, Dh]``, last dimension contiguous.
        dlse: fp32 contiguous ``[Hq, Tq]``.
        row_tiles: ``Tiles.rows``.
        column_tiles: ``Tiles.columns``.
        config: ``Tiles.config``.
        scale: factor of the scores.
        window: keys a query sees, itself included; None for all.
        softcap: 0 for none.

    Returns:
        Gradients in the inputs' shapes and dtypes, contiguous.
    """
    dq, delta = query_gradient(
        q, k, v, out, lse, dout, dlse, row_tiles, config, scale, window, softcap
    )
    dk, dv = key_gradients(q, k, v, lse, delta, dout, column_tiles, config, scale, window, softcap)
    return dq, dk, dv
