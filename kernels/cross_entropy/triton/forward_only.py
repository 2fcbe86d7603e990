"""Losses without gradients in one Triton kernel: no logit is ever written.

A program multiplies a block of rows with its share of the vocabulary tile by tile, keeps the
running maximum and sum of exponentials of each row in fp32, and writes one triple a row. The
vocabulary is shared out so that few rows still fill the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .steps import capped, logits_tile

BLOCK_N, BLOCK_V, BLOCK_D = 128, 128, 64
PROGRAMS = 1024  # wanted; an H200 runs 132 of them at a time


@triton.jit(do_not_specialize=["N", "TILES"])
def forward_kernel(
    hidden,
    weight,
    bias,
    targets,
    row_max,
    row_sum,
    target_logit,
    softcap,
    N,
    V,
    TILES,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Row maximum, sum of exponentials below it and target's logit of a part of the vocabulary.

    One program a block of rows and share of TILES tiles; the outputs are fp32 ``[shares, N]``.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.program_id(1)
    present = rows < N
    target = tl.load(targets + rows, mask=present, other=-1)
    m = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    target_z = tl.zeros((BLOCK_N,), tl.float32)
    last = tl.minimum((share + 1) * TILES * BLOCK_V, V)
    for first in range(share * TILES * BLOCK_V, last, BLOCK_V):
        columns = first + tl.arange(0, BLOCK_V)
        inside = columns < V
        z = logits_tile(
            hidden, weight, rows, columns, present, inside, D, BLOCK_N, BLOCK_V, BLOCK_D
        )
        z = capped(z, bias, columns, inside, softcap, HAS_BIAS, CAPPED)
        hit = (columns[None, :] == target[:, None]) & inside[None, :]
        target_z += tl.sum(tl.where(hit, z, 0.0), 1)
        z = tl.where(inside[None, :], z, -float("inf"))
        new = tl.maximum(m, tl.max(z, 1))
        s = s * tl.exp(m - new) + tl.sum(tl.exp(z - new[:, None]), 1)
        m = new
    place = share.to(tl.int64) * N + rows
    tl.store(row_max + place, m, mask=present)
    tl.store(row_sum + place, s, mask=present)
    tl.store(target_logit + place, target_z, mask=present)


def forward_only(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    """fp32 ``[N]`` losses and log-sum-exps of ``hidden [N, D]`` and ``weight [V, D]``.

    A target that is no index of the vocabulary counts as a logit of 0.
    """
    hidden, weight = hidden.contiguous(), weight.contiguous()
    rows, depth = hidden.shape
    vocabulary = weight.shape[0]
    blocks = triton.cdiv(rows, BLOCK_N)
    tiles = triton.cdiv(vocabulary, BLOCK_V)
    tiles_a_share = max(1, tiles * blocks // PROGRAMS)
    shares = triton.cdiv(tiles, tiles_a_share)
    partial = torch.empty(3, shares, rows, dtype=torch.float32, device=hidden.device)
    forward_kernel[(blocks, shares)](
        hidden,
        weight,
        hidden if bias is None else bias.contiguous(),
        targets.contiguous(),
        *partial,
        softcap,
        rows,
        vocabulary,
        tiles_a_share,
        depth,
        bias is not None,
        softcap > 0,
        BLOCK_N,
        BLOCK_V,
        BLOCK_D,
        num_warps=8,
        num_stages=3,
        enable_fp_fusion=True,
    )
    row_max, row_sum, target_logit = partial
    lse = (row_max + row_sum.log()).logsumexp(0)
    return lse - target_logit.sum(0), lse
