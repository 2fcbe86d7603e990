"""Which kernels a run uses: on a GPU the fastest of those that pass the self-check there."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist

from kernels.attention.interface import automatic_backend, check_backend
from kernels.check import DETERMINISTIC, Heads, Pack, check_attention, check_loss, chunk_of
from trainer.config.schema import Dtype, Mask, RuntimeConfig, TrainConfig
from trainer.data.batches import PackedBatch
from trainer.model.llama import KernelBackends
from trainer.parallel.ranks import Ranks

logger = logging.getLogger(__name__)

LOSS_TOKENS = 16_384  # rows of the loss's timing


def compute_dtype(runtime: RuntimeConfig, device: torch.device) -> torch.dtype:
    """Dtype of the activations; parameters are always fp32."""
    if runtime.dtype is Dtype.auto:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if runtime.dtype is Dtype.bfloat16 else torch.float32


def check_kernels(config: TrainConfig, device: torch.device) -> None:
    """Raise ValueError where the attention asked for cannot run here, before anything is read."""
    attention = config.runtime.attention_backend.value
    if attention == "cudnn" and config.data.mask is not Mask.none:
        raise ValueError(
            f"runtime.attention_backend=cudnn needs data.mask=none, not {config.data.mask.value}: "
            "its backward pass holds segments x longest tokens; use flash or auto"
        )
    if attention != "auto":
        if config.runtime.deterministic and attention not in DETERMINISTIC:
            raise ValueError(
                f"runtime.attention_backend={attention} has other bits in every run and "
                f"runtime.deterministic=true; use auto or one of {', '.join(DETERMINISTIC)}"
            )
        dtype = compute_dtype(config.runtime, device)
        check_backend(attention, device, dtype, config.model.head_dim, "the model")


def choose_kernels(
    config: TrainConfig, batch: Callable[[], PackedBatch], ranks: Ranks
) -> KernelBackends:
    """One name for each kernel, the same on all ranks; the main one checks, times and says why.

    Args:
        config: the run, its vocabulary known.
        batch: reads a micro-batch of the run, not split among context-parallel ranks.
        ranks: all of them call this together.

    Raises:
        ValueError: what was asked for, or everything, fails the self-check; names what failed.
    """
    names = ["", ""]
    if ranks.is_main:
        names = list(checked_kernels(config, batch, ranks))
    if ranks.host_group is not None:
        dist.broadcast_object_list(names, src=0, group=ranks.host_group)
    attention, loss = names
    return KernelBackends(attention, loss, config.runtime.loss_memory.value)


def checked_kernels(
    config: TrainConfig, batch: Callable[[], PackedBatch], ranks: Ranks
) -> tuple[str, str]:
    """Names of the attention and of the loss."""
    runtime, model, device = config.runtime, config.model, ranks.device
    dtype = compute_dtype(runtime, device)
    if device.type != "cuda" or dtype is torch.float32:
        attention, loss = runtime.attention_backend.value, runtime.loss_backend.value
        if attention == "auto":
            attention = automatic_backend(device, dtype, model.head_dim, False)
            if runtime.context_parallel > 1:  # other borders for keys than for queries
                attention = "reference"
        loss = "torch" if loss == "auto" else loss
        logger.info(f"kernels: {attention} attention, {loss} {runtime.loss_memory.value} loss")
        return attention, loss
    packed = batch()
    tokens = len(packed.input_ids)
    pack = Pack(packed.cu_seqlens, packed.max_seqlen, tokens)
    if runtime.context_parallel > 1:
        chunk = tokens // (2 * runtime.context_parallel)
        pack = chunk_of(pack, tokens - chunk, tokens)
    heads = Heads(model.num_heads, model.num_kv_heads, model.head_dim)
    attention = runtime.attention_backend.value
    asked = None if attention == "auto" else attention
    attended = check_attention(
        heads, dtype, device, pack, asked, deterministic=runtime.deterministic
    )
    rows = min(tokens // runtime.context_parallel, LOSS_TOKENS)
    loss = runtime.loss_backend.value
    asked = None if loss == "auto" else loss
    width, vocabulary, memory = model.hidden_size, model.vocab_size, runtime.loss_memory.value
    lost = check_loss(width, vocabulary, dtype, device, rows, memory, asked)
    torch.cuda.empty_cache()
    logger.info(f"{attended.line}\n{lost.line}")
    return attended.backend, lost.backend
