"""The backward passes for sm_90: in one pass, or split and bitwise the same in every run."""

from __future__ import annotations

from torch import Tensor

from .dkdv import HEAD_DIMS, key_gradients_sm90
from .dq import query_gradient_sm90
from .one_pass import gradients_sm90, key_gradients_of_eight_warps


def attention_backward_sm90(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    row_tiles: Tensor,
    column_tiles: Tensor,
    scale: float,
    programs: int,
    one_pass: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    Args:
        q: ``[Tq, Hq, Dh]``, bfloat16 or float16, ``Dh`` 64 or 128, last dimension contiguous.
        k: ``[Tk, Hkv, Dh]``.
        v: ``[Tk, Hkv, Dh]``.
        out: contiguous ``[Tq, Hq, Dh]`` of the forward pass.
        lse: fp32 contiguous ``[Hq, Tq]`` of the forward pass.
        dout: ``[Tq, Hq, Dh]``, last dimension contiguous.
        dlse: fp32 contiguous ``[Hq, Tq]``.
        row_tiles: ``Tiles.rows`` made with 128 rows.
        column_tiles: ``Tiles.columns`` made with 128 columns.
        scale: factor of the scores, positive.
        programs: programs to run, the GPU's multiprocessors.
        one_pass: five products instead of seven, but ``4 Tq Hq Dh`` bytes more and dQ with other
            bits in every run.

    Returns:
        Gradients in the inputs' shapes and dtypes, contiguous.
    """
    if one_pass:
        return gradients_sm90(q, k, v, out, lse, dout, dlse, column_tiles, scale, programs)
    dq, delta = query_gradient_sm90(q, k, v, out, lse, dout, dlse, row_tiles, scale, programs)
    key_gradients = key_gradients_sm90 if q.shape[2] in HEAD_DIMS else key_gradients_of_eight_warps
    return dq, *key_gradients(q, k, v, lse, delta, dout, column_tiles, scale, programs)
