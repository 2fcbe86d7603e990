"""The LM head and the cross-entropy in one operation that never holds all logits.

The gradients of both inputs are computed in the forward pass, while a chunk of logits is at hand,
and multiplied by the upstream gradient in the backward pass. The operation is one opaque
``torch.library`` op, so it can stand in a compiled graph.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from kernels.cross_entropy_torch import Gradients, Options, chunked_cross_entropy

Backend = Literal["torch", "triton"]

# Bytes of fp32 logits held at a time: on a CPU about a core's share of its cache; on a GPU enough
# rows to keep the matrix units busy with a vocabulary of 128k.
CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}
# 8192 rows of a vocabulary of 128k, held in bf16. Each chunk reads and writes the fp32 gradient of
# the weight once: by bytes, a tenth of its matrix product's time at 8192 rows, most of it at 1024.
TRITON_CHUNK_BYTES = 4 << 30


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    denominator: Tensor | None = None,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    grad_weight_out: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_bytes: int | None = None,
    return_token_losses: Literal[False] = False,
    backend: Backend = "torch",
) -> Tensor: ...


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    denominator: Tensor | None = None,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    grad_weight_out: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_bytes: int | None = None,
    return_token_losses: Literal[True],
    backend: Backend = "torch",
) -> tuple[Tensor, Tensor]: ...


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    denominator: Tensor | None = None,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    grad_weight_out: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_bytes: int | None = None,
    return_token_losses: bool = False,
    backend: Backend = "torch",
) -> Tensor | tuple[Tensor, Tensor]:
    """Summed cross-entropy of ``hidden @ weight.T + bias`` divided by ``denominator``.

    Args:
        hidden: ``[N, D]``.
        weight: ``[V, D]``, same dtype as ``hidden``; with ``group`` this rank's part of V.
        targets: int64 ``[N]``, indices into the whole vocabulary.
        bias: ``[V]``.
        ignore_index: rows with this target count nothing.
        token_weight: fp32 ``[N]``, factor of each row.
        denominator: scalar tensor; default the number of rows that count (at least 1).
        softcap: logits become ``softcap * tanh(logits / softcap)``; 0 for none.
        z_loss: factor of the squared log-sum-exp (PaLM, 2204.02311).
        label_smoothing: share of the target spread over the vocabulary, in [0, 1).
        grad_weight_out: fp32 ``[V, D]``; the weight's gradient is added to it in the forward pass
            instead of being returned, so the upstream gradient must be 1.
        group: ranks that hold equal, contiguous parts of the vocabulary in order of their rank.
        chunk_bytes: rows a chunk are those whose fp32 logits fit; default by device and backend.
        return_token_losses: also return fp32 ``[N]`` losses, detached; 0 where the target is
            ignored or the token weight is 0.
        backend: ``torch`` (chunks of logits, every option) or ``triton`` (CUDA; without bias,
            softcap, smoothing and group). The Triton kernels are tested in the interpreter and
            compiled for three architectures, but have not run on a GPU yet; until then they are
            not chosen by themselves.

    Returns:
        Scalar fp32 loss in nats, differentiable once in ``hidden``, ``weight`` and ``bias``.

    Raises:
        ValueError: shapes, dtypes or options that do not fit, naming them.
    """
    check_arguments(hidden, weight, targets, bias, token_weight, grad_weight_out)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1)")
    if backend not in ("torch", "triton"):
        raise ValueError(f"backend={backend!r} is not one of torch, triton")
    if backend == "triton" and (bias is not None or softcap or label_smoothing or group):
        raise ValueError(
            "backend='triton' has no bias, softcap, label_smoothing or group; use backend='torch'"
        )
    if backend == "triton" and hidden.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"backend='triton' needs bfloat16 or float32, hidden is {hidden.dtype}; its "
            "exponentials leave the range of float16; use backend='torch'"
        )
    if backend == "triton" and not hidden.is_cuda:
        raise ValueError(f"backend='triton' needs CUDA tensors, hidden is on {hidden.device}")
    counts = targets != ignore_index
    if denominator is None:
        denominator = counts.sum().clamp(min=1)
    row_weight = counts.float() if token_weight is None else counts * token_weight.float()
    loss, token_loss, _, weight_grad, _ = linear_cross_entropy_op(
        hidden,
        weight if grad_weight_out is None else weight.detach(),
        bias,
        targets,
        row_weight,
        denominator.float(),
        softcap,
        z_loss,
        label_smoothing,
        chunk_bytes
        or (TRITON_CHUNK_BYTES if backend == "triton" else CHUNK_BYTES[hidden.device.type]),
        torch.is_grad_enabled() and hidden.requires_grad,
        grad_weight_out is not None or (torch.is_grad_enabled() and weight.requires_grad),
        torch.is_grad_enabled() and bias is not None and bias.requires_grad,
        "" if group is None else group.group_name,
        backend,
    )
    if grad_weight_out is not None:
        grad_weight_out += weight_grad.detach()
    return (loss, token_loss.detach()) if return_token_losses else loss


@torch.no_grad()
def token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of every row, forward only, in memory proportional to N.

    Args:
        hidden: ``[N, D]``.
        weight: ``[V, D]``.
        targets: int64 ``[N]``.
        bias: ``[V]``.
        ignore_index: rows with it have loss 0.
        softcap: as in :func:`linear_cross_entropy`.

    Returns:
        fp32 ``[N]`` losses in nats and fp32 ``[N]`` log-sum-exps.
    """
    check_arguments(hidden, weight, targets, bias, None, None)
    counts = targets != ignore_index
    losses, lses = chunked_cross_entropy(
        hidden,
        weight,
        bias,
        targets,
        counts.float(),
        Options(softcap),
        rows_per_chunk(CHUNK_BYTES[hidden.device.type], weight),
        None,
    )
    return losses.masked_fill(~counts, 0.0), lses


@torch.library.custom_op("megadocs::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weight: Tensor,
    denominator: Tensor,
    softcap: float,
    z_loss: float,
    label_smoothing: float,
    chunk_bytes: int,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
    group: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, token losses, and the gradients of hidden, weight and bias (empty if not wanted)."""
    grads = empty_gradients(hidden, weight, wants_hidden, wants_weight, wants_bias)
    hidden_grad, weight_grad, bias_grad = grads
    factors = row_weight / denominator
    rows = rows_per_chunk(chunk_bytes, weight)
    if backend == "triton":
        from kernels.cross_entropy_triton import anchored_cross_entropy

        losses, _ = anchored_cross_entropy(
            hidden.contiguous(),
            weight.contiguous(),
            targets.masked_fill(row_weight == 0, -1),
            factors,
            z_loss,
            rows,
            hidden_grad if wants_hidden else None,
            weight_grad if wants_weight else None,
        )
    else:
        wanted = Gradients(
            hidden_grad if wants_hidden else None,
            weight_grad if wants_weight else None,
            bias_grad if wants_bias else None,
        )
        losses, _ = chunked_cross_entropy(
            hidden,
            weight,
            bias,
            targets,
            factors.to(torch.promote_types(hidden.dtype, torch.float32)),
            Options(softcap, z_loss, label_smoothing),
            rows,
            wanted if wants_hidden or wants_weight or wants_bias else None,
            _resolve_process_group(group) if group else None,  # type: ignore[arg-type]
        )
    # A row that is ignored may hold anything, also what is not finite.
    losses = torch.where(row_weight != 0, losses, 0.0)
    return (losses * row_weight).sum() / denominator, losses, hidden_grad, weight_grad, bias_grad


@linear_cross_entropy_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weight: Tensor,
    denominator: Tensor,
    softcap: float,
    z_loss: float,
    label_smoothing: float,
    chunk_bytes: int,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
    group: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = empty_gradients(hidden, weight, wants_hidden, wants_weight, wants_bias)
    precision = torch.promote_types(hidden.dtype, torch.float32)
    losses = hidden.new_empty(hidden.shape[0], dtype=precision)
    return losses.new_empty(()), losses, *grads


def empty_gradients(
    hidden: Tensor,
    weight: Tensor,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient buffers; the weight's and the bias's are accumulated in at least fp32."""
    hidden_grad = torch.empty_like(hidden) if wants_hidden else hidden.new_empty(0)
    weight_shape = weight.shape if wants_weight else (0,)
    bias_shape = (weight.shape[0],) if wants_bias else (0,)
    precision = torch.promote_types(weight.dtype, torch.float32)
    return (
        hidden_grad,
        weight.new_zeros(weight_shape, dtype=precision),
        weight.new_zeros(bias_shape, dtype=precision),
    )


def save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the gradients that the forward pass has computed."""
    _, losses, hidden_grad, weight_grad, bias_grad = output
    ctx.save_for_backward(hidden_grad, weight_grad, bias_grad)
    ctx.mark_non_differentiable(losses, hidden_grad, weight_grad, bias_grad)
    ctx.dtypes = [x.dtype if x is not None else None for x in inputs[:3]]


def scale_gradients(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """Multiply by the upstream gradient, without asking the host what it is."""
    scaled = [
        None if gradient.dim() == 1 and gradient.numel() == 0 else (gradient * upstream).to(dtype)
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    ]
    return (*scaled, *[None] * 12)


linear_cross_entropy_op.register_autograd(scale_gradients, setup_context=save_gradients)


def rows_per_chunk(chunk_bytes: int, weight: Tensor) -> int:
    """Rows whose fp32 logits fit in ``chunk_bytes``, at least one."""
    return max(1, chunk_bytes // (4 * weight.shape[0]))


def check_arguments(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    token_weight: Tensor | None,
    grad_weight_out: Tensor | None,
) -> None:
    """Raise ValueError naming the first argument that does not fit the others."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {[*hidden.shape]} and weight {[*weight.shape]} must be [N, D] and [V, D]"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; cast one of them")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets {[*targets.shape]} must have one entry a row of hidden {[*hidden.shape]}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {[*bias.shape]} must have one entry a row of weight")
    if token_weight is not None and token_weight.shape != targets.shape:
        raise ValueError(f"token_weight {[*token_weight.shape]} must have one entry a target")
    if grad_weight_out is not None and (
        grad_weight_out.shape != weight.shape or grad_weight_out.dtype != torch.float32
    ):
        raise ValueError(
            f"grad_weight_out must be float32 {[*weight.shape]}, not {grad_weight_out.dtype} "
            f"{[*grad_weight_out.shape]}"
        )
