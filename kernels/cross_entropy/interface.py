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

from ..namespace import NAMESPACE
from .chunked import (
    Gradients,
    Options,
    Steps,
    rows_of_chunk,
    sweep_tokens,
    sweep_vocabulary,
)
from .compiled_steps import COMPILED
from .torch_steps import TORCH

Backend = Literal["torch", "triton"]
Memory = Literal["fast", "lean"] | int

# Logits held at a time, on a GPU in the inputs' dtype. Every chunk reads and writes the fp32
# gradient of the weight once: by bytes a tenth of its matrix product's time at 8192 rows and
# most of it at 1024, hence the least number of rows. On a CPU about a core's share of its cache.
# Lean: 96 MiB in all.
CPU_ELEMENTS = 2 << 20
FAST_ELEMENTS = {"torch": 128 << 20, "triton": 1 << 30}
FAST_ROWS = 4096
LEAN_ELEMENTS = {"torch": 6 << 20, "triton": 40 << 20}


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
    memory: Memory = "fast",
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
    memory: Memory = "fast",
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
    memory: Memory = "fast",
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
        memory: ``fast`` holds an fp32 gradient of the weight and large chunks of logits; a number
            is fast with that many bytes of logits; ``lean`` needs at most 128 MiB beside the
            gradients it returns, for a fourth matrix product beside three.
        return_token_losses: also return fp32 ``[N]`` losses, detached; 0 where the target is
            ignored or the token weight is 0.
        backend: ``torch`` (on CUDA its chunks are compiled), or ``triton`` on CUDA;
            ``kernels/check`` says which of them is right on a GPU, and which is faster.

    Returns:
        Scalar fp32 loss in nats, differentiable once in ``hidden``, ``weight`` and ``bias``.

    Raises:
        ValueError: shapes, dtypes or options that do not fit, naming them.
        RuntimeError: targets outside the vocabulary, on a GPU as a device-side assertion.
    """
    check_arguments(hidden, weight, targets, bias, token_weight, grad_weight_out, softcap)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1)")
    check_backend(backend, hidden)
    if memory not in ("fast", "lean") and not (isinstance(memory, int) and memory > 0):
        raise ValueError(f"memory={memory!r} must be fast, lean or a number of bytes")
    counts = targets != ignore_index
    if denominator is None:
        denominator = counts.sum().clamp(min=1)
    row_weight = counts.float() if token_weight is None else counts * token_weight.float()
    learning = torch.is_grad_enabled()
    lean = memory == "lean"
    plan = (chunk_elements(memory, backend, hidden, weight.shape[0]), lean)
    group_name = "" if group is None else group.group_name
    loss, token_loss, lses, _, weight_grad, _ = linear_cross_entropy_op(
        hidden,
        weight if grad_weight_out is None else weight.detach(),
        bias,
        targets,
        row_weight,
        denominator.float(),
        softcap,
        z_loss,
        label_smoothing,
        *plan,
        learning and hidden.requires_grad,
        (learning and weight.requires_grad) if grad_weight_out is None else not lean,
        learning and bias is not None and bias.requires_grad,
        group_name,
        backend,
    )
    if grad_weight_out is not None and lean:
        add_weight_gradient(
            grad_weight_out,
            hidden.detach(),
            weight.detach(),
            None if bias is None else bias.detach(),
            targets,
            row_weight / denominator,
            lses.detach(),
            softcap,
            z_loss,
            label_smoothing,
            plan[0],
            group_name,
            backend,
        )
    elif grad_weight_out is not None:
        grad_weight_out += weight_grad.detach()
    return (loss, token_loss.detach()) if return_token_losses else loss


def chunk_elements(memory: Memory, backend: Backend, hidden: Tensor, vocabulary: int) -> int:
    """Logits to hold at a time, see ``linear_cross_entropy``."""
    if isinstance(memory, int):
        return max(1, memory // (hidden.element_size() if hidden.is_cuda else 4))
    if not hidden.is_cuda:
        return CPU_ELEMENTS
    if memory == "lean":
        return LEAN_ELEMENTS[backend]
    return max(FAST_ELEMENTS[backend], FAST_ROWS * vocabulary)


def fast_bytes(vocabulary: int) -> int:
    """The most that ``memory="fast"`` holds of half-precision logits at a time on a GPU."""
    return 2 * max(*FAST_ELEMENTS.values(), FAST_ROWS * vocabulary)


def steps_of(backend: str, on_gpu: bool) -> Steps:
    """The backend's chunks; Triton is imported only where it is asked for."""
    if backend == "torch":
        return COMPILED if on_gpu else TORCH
    from .triton.steps import TRITON

    return TRITON


@torch.no_grad()
def token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float = 0.0,
    backend: Backend = "torch",
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of every row, forward only, in memory proportional to N.

    Args:
        hidden: ``[N, D]``.
        weight: ``[V, D]``.
        targets: int64 ``[N]``.
        bias: ``[V]``.
        ignore_index: rows with it have loss 0.
        softcap: as in :func:`linear_cross_entropy`.
        backend: ``torch`` holds a chunk of logits at a time, ``triton`` (CUDA) a tile.

    Returns:
        fp32 ``[N]`` losses in nats and fp32 ``[N]`` log-sum-exps, from logits that are not rounded.

    Raises:
        ValueError, RuntimeError: as :func:`linear_cross_entropy`.
    """
    check_arguments(hidden, weight, targets, bias, None, None, softcap)
    check_backend(backend, hidden)
    counts = targets != ignore_index
    check_targets(targets, counts, weight.shape[0])
    if backend == "triton":
        from .triton.forward_only import forward_only

        losses, lses = forward_only(hidden, weight, bias, targets, softcap)
    else:
        elements = chunk_elements("fast", backend, hidden, weight.shape[0])
        losses, lses = sweep_tokens(
            steps_of(backend, hidden.is_cuda),
            hidden,
            weight,
            bias,
            targets,
            counts.float(),
            Options(softcap),
            elements // 2 if hidden.is_cuda else elements,  # they are not rounded to half precision
            None,
        )
    return losses.masked_fill(~counts, 0.0), lses


@torch.library.custom_op(f"{NAMESPACE}::linear_cross_entropy", mutates_args=())
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
    chunk_elements: int,
    lean: bool,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
    group: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, losses and log-sum-exps of the rows, gradients of hidden, weight, bias (or empty)."""
    grads = empty_gradients(hidden, weight, lean, wants_hidden, wants_weight, wants_bias)
    hidden_grad, weight_grad, bias_grad = grads
    ranks = ranks_of(group)
    vocabulary = weight.shape[0] * (1 if ranks is None else dist.get_world_size(ranks))
    check_targets(targets, row_weight != 0, vocabulary)
    options = Options(softcap, z_loss, label_smoothing)
    factors = (row_weight / denominator).to(torch.promote_types(hidden.dtype, torch.float32))
    dx = hidden_grad if wants_hidden else None
    dw = weight_grad if wants_weight else None
    db = bias_grad if wants_bias else None
    plain = bias is None and not softcap and not label_smoothing and not group
    if backend == "triton" and plain and not lean and hidden.dtype != torch.float16:
        from .triton.anchored import anchored_cross_entropy

        losses, lses = anchored_cross_entropy(
            hidden.contiguous(),
            weight.contiguous(),
            targets.masked_fill(row_weight == 0, -1),
            factors,
            z_loss,
            rows_of_chunk(chunk_elements, weight.shape[0]),
            dx,
            dw,
        )
    else:
        steps = steps_of(backend, hidden.is_cuda)
        wanted = Gradients(dx, None, None) if lean else Gradients(dx, dw, db)
        inputs = (hidden, weight, bias, targets, factors)
        learning = wants_hidden or wants_weight or wants_bias
        losses, lses = sweep_tokens(
            steps, *inputs, options, chunk_elements, wanted if learning else None, ranks
        )
        if lean and (wants_weight or wants_bias):
            sweep_vocabulary(
                steps, *inputs, lses, options, chunk_elements, Gradients(None, dw, db), ranks
            )
    # A row that is ignored may hold anything, also what is not finite.
    losses = torch.where(row_weight != 0, losses, 0.0)
    loss = (losses * row_weight).sum() / denominator
    return loss, losses, lses, hidden_grad, weight_grad, bias_grad


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
    chunk_elements: int,
    lean: bool,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
    group: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = empty_gradients(hidden, weight, lean, wants_hidden, wants_weight, wants_bias)
    precision = torch.promote_types(hidden.dtype, torch.float32)
    losses = hidden.new_empty(hidden.shape[0], dtype=precision)
    return losses.new_empty(()), losses, torch.empty_like(losses), *grads


def empty_gradients(
    hidden: Tensor,
    weight: Tensor,
    lean: bool,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient buffers; what is added up over chunks is in at least fp32."""
    hidden_grad = torch.empty_like(hidden) if wants_hidden else hidden.new_empty(0)
    weight_shape = weight.shape if wants_weight else (0,)
    bias_shape = (weight.shape[0],) if wants_bias else (0,)
    precision = torch.promote_types(weight.dtype, torch.float32)
    return (
        hidden_grad,
        weight.new_zeros(weight_shape, dtype=weight.dtype if lean else precision),
        weight.new_zeros(bias_shape, dtype=precision),
    )


def save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the gradients that the forward pass has computed."""
    _, losses, lses, *gradients = output
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(losses, lses, *gradients)
    ctx.dtypes = [x.dtype if x is not None else None for x in inputs[:3]]
    ctx.lean = inputs[10]


def scale_gradients(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """Multiply by the upstream gradient, without asking the host what it is.

    Lean gradients are multiplied in place, so their graph can be walked once only; torch refuses a
    second time. A compiler that traces this plans the memory itself and must see no mutation.

    Raises:
        RuntimeError: gradients of the gradients are wanted, which would silently be 0.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_cross_entropy can be differentiated once, not with create_graph=True; use "
            "torch.nn.functional.cross_entropy for higher derivatives"
        )
    scaled: list[Tensor | None] = []
    for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
        if gradient.dim() == 1 and gradient.numel() == 0:
            scaled.append(None)
        elif ctx.lean and type(gradient) is Tensor:
            scaled.append(gradient.mul_(upstream).to(dtype))
        else:
            scaled.append((gradient * upstream).to(dtype))
    return (*scaled, *[None] * 13)


linear_cross_entropy_op.register_autograd(scale_gradients, setup_context=save_gradients)


@torch.library.custom_op(f"{NAMESPACE}::add_weight_gradient", mutates_args=("buffer",))
def add_weight_gradient(
    buffer: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    factors: Tensor,
    lses: Tensor,
    softcap: float,
    z_loss: float,
    label_smoothing: float,
    chunk_elements: int,
    group: str,
    backend: str,
) -> None:
    """Add the weight's gradient to an fp32 ``[V, D]`` buffer in a sweep over the vocabulary."""
    sweep_vocabulary(
        steps_of(backend, hidden.is_cuda),
        hidden,
        weight,
        bias,
        targets,
        factors.to(lses.dtype),
        lses,
        Options(softcap, z_loss, label_smoothing),
        chunk_elements,
        Gradients(None, buffer, None),
        ranks_of(group),
    )


def ranks_of(group: str) -> dist.ProcessGroup | None:
    """The process group of a name; an op's arguments cannot hold the group itself."""
    return _resolve_process_group(group) if group else None  # type: ignore[arg-type]


def check_backend(backend: str, hidden: Tensor) -> None:
    """Raise ValueError for a backend that is unknown or cannot run where the inputs are."""
    if backend not in ("torch", "triton"):
        raise ValueError(f"backend={backend!r} is not one of torch, triton")
    if backend == "triton" and (not hidden.is_cuda or hidden.dtype == torch.float64):
        raise ValueError(
            f"backend='triton' needs CUDA tensors of up to 32 bits, hidden is {hidden.dtype} on "
            f"{hidden.device}; use backend='torch'"
        )


def check_targets(targets: Tensor, counts: Tensor, vocabulary: int) -> None:
    """Stop at a row that counts and whose target is no index, without waiting for a GPU.

    There it is a device-side assertion; the kernels would write outside the row's logits.
    """
    inside = (targets >= 0) & (targets < vocabulary)
    torch._assert_async(
        (inside | ~counts).all(),
        f"targets must be ignore_index or indices of the vocabulary, 0 to {vocabulary - 1}",
    )


def check_arguments(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    token_weight: Tensor | None,
    grad_weight_out: Tensor | None,
    softcap: float,
) -> None:
    """Raise ValueError naming the first argument that does not fit the others."""
    if softcap < 0:
        raise ValueError(f"softcap={softcap} must be positive, or 0 for none")
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
