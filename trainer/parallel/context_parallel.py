"""Context parallelism: several ranks hold one token axis, so a document may exceed one GPU.

The axis of T tokens is cut into 2 W chunks for W ranks; rank r holds chunks r and 2 W - 1 - r, so
that early tokens (few keys) and late ones (many) are shared out evenly. Everything but attention is
local to a token. Attention gathers keys and values of all ranks and computes its own queries with
separate borders for queries and keys, which is exact for any packing: with global borders ``c`` and
a chunk ``[a, b)``, the queries' borders are ``clip(c, a, b) - a`` and the keys' ``min(c, b)``, and
causality aligned at the segments' ends is the causality of the whole axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from kernels import attention_tiles, varlen_attention
from kernels.attention.op import OURS
from kernels.attention.tile_scheduler import Tiles
from trainer.config.schema import ModelConfig
from trainer.data.batches import PackedBatch
from trainer.model.llama import Attention, KernelBackends, Llama

# The differentiable all-gather got another name after PyTorch 2.11.
all_gather: Callable[..., Tensor] = getattr(
    collectives, "all_gather_single_autograd", None
) or getattr(collectives, "all_gather_tensor_autograd")  # noqa: B009
PER_TOKEN = ("input_ids", "targets", "positions", "target_documents", "target_positions")


class ContextParallelAttention:
    """``varlen_attention`` for queries, keys and values of which a rank holds its two chunks."""

    def __init__(self, group: dist.ProcessGroup, backend: str) -> None:
        self.group = group
        self.backend: Any = backend
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, tiles: Any
    ) -> Tensor:
        """Output ``[T / W, Hq, Dh]`` of this rank's queries.

        Args:
            q: ``[T / W, Hq, Dh]``, this rank's two chunks.
            k: ``[T / W, Hkv, Dh]``.
            v: ``[T / W, Hkv, Dh]``.
            cu_seqlens: int32 ``[S+1]``, borders on the whole axis of T tokens.
            max_seqlen: upper bound of the segment lengths.
            tiles: of :func:`chunk_tiles`.
        """
        chunk = q.shape[0] // 2
        both = torch.cat((k, v), dim=1)  # [T / W, 2 Hkv, Dh]
        gathered = all_gather(both, 0, self.group)
        order = axis_order(self.size)
        parts = gathered.unflatten(0, (2 * self.size, chunk))  # [2 W, chunk, 2 Hkv, Dh]
        keys, values = torch.cat([parts[place] for place in order]).chunk(2, dim=1)  # [T, Hkv, Dh]
        outputs = []
        for own, index in enumerate(chunks_of(self.rank, self.size)):
            start, end = index * chunk, (index + 1) * chunk
            outputs.append(
                varlen_attention(
                    q[own * chunk : (own + 1) * chunk],
                    keys,
                    values,
                    cu_seqlens.clamp(start, end) - start,
                    min(max_seqlen, chunk),
                    cu_seqlens_k=cu_seqlens.clamp(max=end),
                    max_seqlen_k=max_seqlen,
                    backend=self.backend,
                    tiles=None if tiles is None else tiles[own],
                )
            )
        return torch.cat(outputs)


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """The two chunks that a rank holds, in the order in which it holds them."""
    return rank, 2 * size - 1 - rank


def axis_order(size: int) -> list[int]:
    """Where each chunk of the axis lies among the gathered ones."""
    held = [chunk for rank in range(size) for chunk in chunks_of(rank, size)]
    return [held.index(chunk) for chunk in range(2 * size)]


def split_batch(batch: PackedBatch, rank: int, size: int) -> PackedBatch:
    """The rank's part of a batch; borders and ``max_seqlen`` stay those of the whole axis."""
    if size == 1:
        return batch
    chunk = len(batch.input_ids) // (2 * size)
    starts = [index * chunk for index in chunks_of(rank, size)]
    parts = {
        name: torch.cat([getattr(batch, name)[start : start + chunk] for start in starts])
        for name in PER_TOKEN
    }
    held = sum(min(max(batch.tokens - start, 0), chunk) for start in starts)
    valid = int((parts["targets"] != -100).sum())
    return dataclasses.replace(batch, **parts, tokens=held, valid_targets=valid)  # type: ignore[arg-type]


def chunk_tiles(
    kernels: KernelBackends,
    config: ModelConfig,
    rank: int,
    size: int,
    cu_seqlens: Tensor,
    max_seqlen: int,
    tokens: int,
) -> list[Tiles] | None:
    """Tables of the two chunks of a rank that holds ``tokens``, made once for all layers."""
    if kernels.attention not in OURS:
        return None
    chunk = tokens // 2
    return [
        attention_tiles(
            cu_seqlens.clamp(index * chunk, (index + 1) * chunk) - index * chunk,
            chunk,
            config.head_dim,
            config.num_heads // config.num_kv_heads,
            max_seqlen=min(max_seqlen, chunk),
            cu_seqlens_k=cu_seqlens.clamp(max=(index + 1) * chunk),
            tokens_k=size * tokens,
            gluon=kernels.attention != "triton",
        )
        for index in chunks_of(rank, size)
    ]


def apply_context_parallel(model: Llama, group: dist.ProcessGroup) -> None:
    """Let every attention layer of ``model`` work across the ranks of ``group``."""
    place = dist.get_rank(group), dist.get_world_size(group)
    model.tiles = partial(chunk_tiles, model.kernels, model.config, *place)
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = ContextParallelAttention(group, model.kernels.attention)
