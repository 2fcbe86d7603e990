"""A Llama-style decoder on one packed token axis.

There is no batch dimension: ``cu_seqlens`` says which tokens may see each other, so the masks of
the data path (``none``, ``document``, ``megadoc``) are invisible here. Module names follow Hugging
Face's Llama, which makes export a plain dump.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import attention_tiles, linear_cross_entropy, token_losses, varlen_attention
from kernels.attention.flex import document_block_mask
from kernels.attention.op import OURS
from trainer.config.schema import ModelConfig


@dataclass(frozen=True)
class KernelBackends:
    """Which implementations of ``kernels/`` the model calls; they give the same numbers."""

    attention: str = "auto"  # backend of varlen_attention
    loss: str = "torch"  # backend of linear_cross_entropy
    loss_memory: str = "fast"  # or lean

    def tiles(self, config: ModelConfig, cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> Any:
        """What an attention backend shares among the layers of a batch; None for most."""
        if self.attention == "flex":
            return document_block_mask(cu_seqlens, tokens)
        if self.attention not in OURS:
            return None
        group = config.num_heads // config.num_kv_heads
        gluon = self.attention != "triton"
        return attention_tiles(
            cu_seqlens, tokens, config.head_dim, group, max_seqlen=max_seqlen, gluon=gluon
        )


class SoftTargets(NamedTuple):
    """Predictions of teachers for the tokens of a batch, see ``trainer/run/distillation.py``."""

    share: float  # of the loss
    hidden: list[Tensor]  # [T, D] of each teacher
    heads: list[Tensor]  # [V, D] of each teacher
    loss: Callable[[Tensor, Tensor, Tensor, Tensor, SoftTargets], Tensor]


class Linear(nn.Linear):
    """A linear layer without bias whose fp32 weight is cast to the activations' dtype."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary embeddings, fp32 ``[T, 1, Dh]`` (RoFormer, in halves)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions.float()[:, None] * theta ** (-exponents / head_dim)  # [T, Dh/2]
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]  # [T, 1, Dh]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to ``x [T, H, Dh]``."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention inside each segment."""

    def __init__(self, config: ModelConfig, kernels: KernelBackends) -> None:
        super().__init__()
        kv_size = config.num_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        # trainer/parallel/context_parallel.py puts its own in this place
        self.attend: Callable[..., Tensor] = partial(varlen_attention, backend=kernels.attention)
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, kv_size)
        self.v_proj = Linear(config.hidden_size, kv_size)
        self.o_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        tiles: Any = None,
    ) -> Tensor:
        """``x [T, D]`` -> ``[T, D]``; ``cos``, ``sin`` ``[T, 1, Dh]`` are the rotary tables."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # [T, Hq, Dh]
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # [T, Hkv, Dh]
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # [T, Hkv, Dh]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = self.attend(q, k, v, cu_seqlens, max_seqlen, tiles=tiles)
        projected: Tensor = self.o_proj(out.flatten(1))
        return projected


class MLP(nn.Module):
    """SwiGLU feed-forward block (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """``x [T, D]`` -> ``[T, D]``."""
        projected: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return projected


class Block(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: ModelConfig, kernels: KernelBackends) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, kernels)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        tiles: Any = None,
    ) -> Tensor:
        """``x [T, D]`` -> ``[T, D]``; the other arguments are :class:`Attention`'s."""
        normed = self.input_layernorm(x)
        attended = self.self_attn(normed, cos, sin, cu_seqlens, max_seqlen, tiles)
        x = x + F.dropout(attended, self.dropout, self.training)
        return x + F.dropout(
            self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training
        )


class Decoder(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: ModelConfig, kernels: KernelBackends) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kernels) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Llama(nn.Module):
    """The language model; parameters are fp32, activations ``compute_dtype``."""

    def __init__(
        self,
        config: ModelConfig,
        seed: int = 0,
        compute_dtype: torch.dtype = torch.float32,
        kernels: KernelBackends = KernelBackends(),
    ) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.compute_dtype = compute_dtype
        self.kernels = kernels
        # trainer/parallel/context_parallel.py puts its own in this place
        self.tiles: Callable[[Tensor, int, int], Any] = partial(kernels.tiles, config)
        self.model = Decoder(config, kernels)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.reset_parameters(seed)

    def reset_parameters(self, seed: int) -> None:
        """Draw every matrix from N(0, init_std); norms start at one."""
        generator = torch.Generator(device=self.lm_head.weight.device).manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=self.config.init_std, generator=generator)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        targets: Tensor,
        denominator: Tensor | None = None,
        soft: SoftTargets | None = None,
    ) -> Tensor:
        """The training loss.

        Args:
            input_ids: int64 ``[T]``, the packed token axis.
            positions: int64 ``[T]``, place of each token in its segment.
            cu_seqlens: int32 ``[S+1]``, segment borders; zero-length segments are allowed.
            max_seqlen: upper bound of the segment lengths.
            targets: int64 ``[T]``, -100 where there is nothing to predict.
            denominator: scalar; the summed loss is divided by it (default: the valid targets).
            soft: teachers whose predictions share the loss; needs ``denominator``.

        Returns:
            fp32 scalar, in nats.
        """
        hidden = self.hidden_states(input_ids, positions, cu_seqlens, max_seqlen)
        if soft is not None:
            assert denominator is not None
            return soft.loss(hidden, self.lm_head.weight, targets, denominator, soft)
        weight = self.lm_head.weight.to(hidden.dtype)  # [V, D]
        backend: Any = self.kernels.loss
        memory: Any = self.kernels.loss_memory
        return linear_cross_entropy(
            hidden, weight, targets, denominator=denominator, memory=memory, backend=backend
        )

    def hidden_states(
        self, input_ids: Tensor, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """``[T, D]`` in ``compute_dtype``, after the final norm; arguments as of ``forward``."""
        x = F.embedding(input_ids, self.model.embed_tokens.weight).to(self.compute_dtype)
        cos, sin = rotary_tables(positions, self.config.head_dim, self.config.rope_theta)
        tiles = self.tiles(cu_seqlens, max_seqlen, len(input_ids))
        for layer in self.model.layers:
            x = layer(x, cos, sin, cu_seqlens, max_seqlen, tiles)
        hidden: Tensor = self.model.norm(x)
        return hidden

    @torch.no_grad()
    def token_losses(
        self,
        input_ids: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        targets: Tensor,
    ) -> Tensor:
        """fp32 ``[T]``, the loss of every token in nats; 0 where there is nothing to predict."""
        hidden = self.hidden_states(input_ids, positions, cu_seqlens, max_seqlen)
        weight = self.lm_head.weight.to(hidden.dtype)
        backend: Any = self.kernels.loss
        return token_losses(hidden, weight, targets, backend=backend)[0]
