"""Deterministic backward pass of document-masked attention in two kernels without atomics.

Splitting it costs seven products where one kernel that adds to dQ atomically needs five; in return
every gradient is accumulated in fp32 registers, written once, and bitwise the same in every run.
"""

from __future__ import annotations

from torch import Tensor

from ..sm90.dkdv import HEAD_DIMS, key_gradients_sm90
from ..sm90.dq import query_gradient_sm90
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
    gluon_programs: int | None = None,
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
        gluon_programs: programs of the persistent sm_90 kernels; None for the portable ones.

    Returns:
        Gradients in the inputs' shapes and dtypes, contiguous.
    """
    if gluon_programs is None:
        dq, delta = query_gradient(
            q, k, v, out, lse, dout, dlse, row_tiles, config, scale, window, softcap
        )
    else:
        dq, delta = query_gradient_sm90(
            q, k, v, out, lse, dout, dlse, row_tiles, scale, gluon_programs
        )
    if gluon_programs is None or q.shape[2] not in HEAD_DIMS:
        dk, dv = key_gradients(
            q, k, v, lse, delta, dout, column_tiles, config, scale, window, softcap
        )
    else:
        dk, dv = key_gradients_sm90(q, k, v, lse, delta, dout, column_tiles, scale, gluon_programs)
    return dq, dk, dv
