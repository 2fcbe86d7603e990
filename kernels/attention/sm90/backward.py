"""The backward passes for sm_90: in one pass, or split and bitwise the same in every run."""

from __future__ import annotations

import torch
from torch import Tensor

from ..saved import Saved
from .dkdv import key_gradients_sm90
from .dq import delta_sm90, query_gradient_sm90


def attention_backward_sm90(
    saved: Saved,
    q_tiles: Tensor,
    kv_tiles: Tensor,
    scale: float,
    programs: int,
    one_pass: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    Args:
        saved: bfloat16 or float16, ``Dh`` 64, 96 or 128.
        q_tiles: ``Tiles.q_tiles`` made with 128 rows.
        kv_tiles: ``Tiles.kv_tiles`` made with 128 columns.
        scale: factor of the scores, positive.
        programs: programs to run, the GPU's multiprocessors.
        one_pass: five products instead of seven, but ``4 Tq Hq Dh`` bytes more and dQ summed in
            any order, with other bits in every run.

    Returns:
        Gradients in the inputs' shapes and dtypes, contiguous.
    """
    if not one_pass:
        dq, delta = query_gradient_sm90(saved, q_tiles, scale, programs)
        return dq, *key_gradients_sm90(saved, delta, kv_tiles, scale, programs)
    dq_sum = torch.zeros(saved.q.shape, dtype=torch.float32, device=saved.q.device)
    delta = delta_sm90(saved)
    dk, dv = key_gradients_sm90(saved, delta, kv_tiles, scale, programs, dq_sum)
    dq = torch.empty_like(saved.q, memory_format=torch.contiguous_format)
    return torch.mul(dq_sum, scale, out=dq), dk, dv
