"""How much of the forward pass is kept for the backward pass, and choosing it by memory.

none        everything is kept
selective   a block is computed again, but for its attention, the dear part of a long document
full        only the inputs of the blocks are kept
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from kernels.cross_entropy.interface import fast_bytes
from trainer.config.schema import (
    ActivationCheckpointing,
    AttentionBackend,
    Averaging,
    LossMemory,
    TrainConfig,
)
from trainer.model.llama import Llama

# Operators whose results a selective block keeps, by name: ours, PyTorch's, flash-attn's.
ATTENTION = (
    "varlen_attention",
    "varlen_attn",
    "scaled_dot_product",
    "flash_attn",
    "flex_attention",
)
STATE_BYTES = 16  # a parameter: fp32 weight, gradient and two moments
WEIGHT_BYTES = 4  # a parameter of the averaged weights, or of a teacher
LEAN_BYTES = 128 << 20  # of a loss in loss_memory=lean
SAFETY = 1.25  # fragmentation, libraries, temporaries
USABLE = 0.94  # of the device's memory


def recompute_blocks(model: Llama, mode: ActivationCheckpointing) -> None:
    """Wrap every block so that ``mode`` says what is computed again."""
    if mode is ActivationCheckpointing.none:
        return
    options: dict[str, Any] = {}
    if mode is ActivationCheckpointing.selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_attention)
        # It asks to make sure that nothing is changed in place, on every rank; nothing is.
        logging.getLogger("torch._higher_order_ops.wrap").addFilter(says_something_else)
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(layer, **options)


def says_something_else(record: logging.LogRecord) -> bool:
    """Whether a record is not the warning of a ``context_fn`` under torch.compile."""
    return "context_fn is passed" not in record.getMessage()


def keep_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what attention gives, compute the rest again."""
    if any(name in str(operator) for name in ATTENTION):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def choose_recompute(
    config: TrainConfig, tokens: int, shards: int, device: torch.device
) -> ActivationCheckpointing:
    """The cheapest mode that fits the device's memory; ``none`` on a CPU.

    Args:
        config: the run.
        tokens: places of one micro-batch on one rank.
        shards: ranks that share one copy of the model's states.
        device: where it runs.
    """
    if config.runtime.activation_checkpointing is not ActivationCheckpointing.auto:
        return config.runtime.activation_checkpointing
    if device.type != "cuda":
        return ActivationCheckpointing.none
    memory = USABLE * torch.cuda.get_device_properties(device).total_memory
    for mode in (ActivationCheckpointing.none, ActivationCheckpointing.selective):
        if step_bytes(config, tokens, shards, mode) <= memory:
            return mode
    return ActivationCheckpointing.full


def step_bytes(config: TrainConfig, tokens: int, shards: int, mode: ActivationCheckpointing) -> int:
    """Estimate of the peak of one step in bytes, activations in bf16."""
    model = config.model
    width, kv_width = model.hidden_size, model.num_kv_heads * model.head_dim
    # Inputs of norms (2), their outputs (2), queries and attention's output; keys and values; the
    # three products of the feed-forward block.
    block = 2 * (6 * width + 2 * kv_width + 3 * model.intermediate_size)
    if config.runtime.compile is False:
        # The activation function's result too, and what libraries read of q, k and v.
        block += 2 * (model.intermediate_size + width + 2 * kv_width)
    kept = {
        ActivationCheckpointing.none: block,
        ActivationCheckpointing.selective: 2 * 2 * width,
        ActivationCheckpointing.full: 2 * width,
    }[mode]
    # Context parallelism gathers keys and values of the whole axis, in the order of ranks and in
    # that of the axis; the latter are kept where a block is not computed again.
    ranks = config.runtime.context_parallel
    gathered = 2 * 2 * kv_width * ranks if ranks > 1 else 0
    working = block + 2 * gathered  # of one block
    if mode is ActivationCheckpointing.none:
        kept, working = kept + gathered, gathered
    # The backward pass of gluon sums dQ in fp32; only the GPU says what auto is.
    backend = config.runtime.attention_backend
    if backend in (AttentionBackend.auto, AttentionBackend.gluon):
        working += 4 * width
    activations = tokens * (model.num_layers * kept + working + 4 * 2 * width)
    head = 2 * 4 * model.vocab_size * width  # fp32 gradient of the head and its copy
    lean = config.runtime.loss_memory is LossMemory.lean
    loss = LEAN_BYTES if lean else fast_bytes(model.vocab_size)
    averaged = WEIGHT_BYTES if config.optimizer.averaging is not Averaging.none else 0
    states = (STATE_BYTES + averaged) * model.parameter_count() // shards
    # Teachers are not sharded, and taken to be as large as the student.
    states += len(config.distillation.teachers) * WEIGHT_BYTES * model.parameter_count()
    return int(SAFETY * (activations + head + loss) + states)
