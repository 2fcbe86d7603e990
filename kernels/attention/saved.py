"""What every backward pass of attention gets."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Saved(NamedTuple):
    """Inputs and results of the forward pass, and the gradients of its results.

    Attributes:
        q: ``[Tq, Hq, Dh]``, last dimension contiguous; k, v and dout likewise.
        k: ``[Tk, Hkv, Dh]``.
        v: ``[Tk, Hkv, Dh]``.
        out: contiguous ``[Tq, Hq, Dh]``.
        lse: fp32 contiguous ``[Hq, Tq]``.
        dout: ``[Tq, Hq, Dh]``.
        dlse: fp32 contiguous ``[Hq, Tq]``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    dout: Tensor
    dlse: Tensor
