"""The Triton attention as one opaque ``torch.library`` op with fakes, autograd and FLOP counts.

The tile tables are inputs, so the op neither looks at the segment borders nor waits for the host,
and it can stand in a compiled graph, a CUDA graph or a checkpointed block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..namespace import NAMESPACE
from .saved import Saved
from .tile_config import TileConfig, split, tile_config
from .tile_scheduler import Tiles, make_tiles

OURS = ("triton", "gluon", "gluon_split")  # backends of :func:`kernels.varlen_attention`


def attention_tiles(
    cu_seqlens: Tensor,
    tokens: int,
    head_dim: int,
    group: int,
    *,
    max_seqlen: int | None = None,
    cu_seqlens_k: Tensor | None = None,
    tokens_k: int | None = None,
    window: int | None = None,
    gluon: bool = False,
) -> Tiles:
    """Tile tables for ``varlen_attention(backend="triton")``: made once, used by every layer.

    Args:
        cu_seqlens: int32 ``[S+1]`` borders of the queries.
        tokens: length of the packed axis.
        head_dim: size of a head.
        group: query heads a key head.
        max_seqlen: bound of the segment lengths, which decides the tiles; default ``tokens``.
        cu_seqlens_k: borders of the keys where they differ.
        tokens_k: length of the key axis where it differs.
        window: keys a query sees, itself included; None for all.
        gluon: for ``backend="gluon"`` and ``"gluon_split"``, whose tiles have one size.

    Raises:
        ValueError: no tile sizes for this GPU or head dimension.
    """
    longest = tokens if max_seqlen is None else max_seqlen
    config = tile_config(cu_seqlens.device, head_dim, group, longest)
    if gluon:
        config = with_gluon_tiles(config)
    keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    length = tokens if tokens_k is None else tokens_k
    return make_tiles(cu_seqlens, keys, tokens, length, config, window)


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_seqlens_k: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float,
    tiles: Tiles | None,
    backend: str = "triton",
) -> tuple[Tensor, Tensor]:
    """Document-masked causal attention by our own kernels.

    Arguments are those of :func:`kernels.varlen_attention`; ``backend`` is one of ``OURS``.

    Returns:
        ``[Tq, Hq, Dh]`` and the fp32 log-sum-exp ``[Hq, Tq]``, both differentiable.

    Raises:
        ValueError: a dtype, head dimension or scale that the kernels do not take.
    """
    if not q.dtype == k.dtype == v.dtype or v.shape[2] != q.shape[2]:
        raise ValueError(
            "backend='triton' needs one dtype and one head dimension, not "
            f"{q.dtype} {[*q.shape]}, {k.dtype} {[*k.shape]}, {v.dtype} {[*v.shape]}"
        )
    if scale <= 0:
        raise ValueError(f"scale={scale} must be positive with backend='triton'")
    if backend != "triton" and tiles is not None and tiles.config != with_gluon_tiles(tiles.config):
        raise ValueError(f"these tiles are not for backend={backend!r}; make them with gluon=True")
    if tiles is None:
        tiles = attention_tiles(
            cu_seqlens,
            q.shape[0],
            q.shape[2],
            q.shape[1] // k.shape[1],
            max_seqlen=max_seqlen,
            cu_seqlens_k=cu_seqlens_k,
            tokens_k=k.shape[0],
            window=window,
            gluon=backend != "triton",
        )
    out, lse = attention_op(
        q,
        k,
        v,
        tiles.q_tiles,
        tiles.kv_tiles,
        list(tiles.config),
        max_seqlen,
        scale,
        window or 0,
        softcap,
        backend,
    )
    return out, lse


def gluon_refusal(device: torch.device, head_dim: int) -> str | None:
    """Why the sm_90 kernels cannot run, or None."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return "it needs an sm_90 GPU (H100, H200)"
    if head_dim not in (64, 96, 128):
        return f"it has head dimensions 64, 96 and 128, not {head_dim}"
    return triton_refusal(device, head_dim)


def triton_refusal(device: torch.device, head_dim: int) -> str | None:
    """Why the portable kernels cannot run, or None."""
    try:
        split(head_dim)
        tile_config(device, head_dim, 1, 1)
    except ValueError as error:
        return str(error)
    return None


def with_gluon_tiles(config: TileConfig) -> TileConfig:
    """The Gluon kernels have tiles of 128."""
    return config._replace(q_tile=128, kv_tile=128)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def interpreted() -> bool:
    """Whether TRITON_INTERPRET is set."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@torch.library.custom_op(f"{NAMESPACE}::varlen_attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_tiles: Tensor,
    kv_tiles: Tensor,
    config: Sequence[int],
    max_seqlen: int,
    scale: float,
    window: int,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; ``window`` is 0 for none, ``max_seqlen`` only counts FLOPs."""
    from .triton.forward import attention_forward

    q, k, v = (with_contiguous_heads(x) for x in (q, k, v))
    if backend != "triton" and len(q) and len(k):  # TMA cannot describe a tensor without rows
        from .sm90.forward import attention_forward_sm90

        return attention_forward_sm90(q, k, v, q_tiles, scale, multiprocessors(q.device))
    return attention_forward(q, k, v, q_tiles, TileConfig(*config), scale, window or None, softcap)


@attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_tiles: Tensor,
    kv_tiles: Tensor,
    config: Sequence[int],
    max_seqlen: int,
    scale: float,
    window: int,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::varlen_attention_backward", mutates_args=())
def attention_backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    q_tiles: Tensor,
    kv_tiles: Tensor,
    config: Sequence[int],
    max_seqlen: int,
    scale: float,
    window: int,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    from .triton.backward import attention_backward

    q, k, v, dout = (with_contiguous_heads(x) for x in (q, k, v, dout))
    saved = Saved(q, k, v, out, lse, dout, dlse.contiguous())
    if backend != "triton" and len(q) and len(k):
        from .sm90.backward import attention_backward_sm90

        one_pass = backend == "gluon"
        programs = multiprocessors(q.device)
        return attention_backward_sm90(saved, q_tiles, kv_tiles, scale, programs, one_pass)
    tile_sizes = TileConfig(*config)
    return attention_backward(saved, q_tiles, kv_tiles, tile_sizes, scale, window or None, softcap)


@attention_backward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep the inputs, the output and the log-sum-exp; scores are computed again."""
    q, k, v, q_tiles, kv_tiles, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, q_tiles, kv_tiles)


def attention_gradients(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    """Call the backward op; only q, k and v have gradients."""
    q, k, v, out, lse, q_tiles, kv_tiles = ctx.saved_tensors
    gradients = attention_backward_op(
        q, k, v, out, lse, dout, dlse, q_tiles, kv_tiles, *ctx.options
    )
    return (*gradients, *[None] * 8)


attention_op.register_autograd(attention_gradients, setup_context=save_for_backward)


def multiprocessors(device: torch.device) -> int:
    """Programs of a persistent kernel."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def with_contiguous_heads(x: Tensor) -> Tensor:
    """x itself unless its last dimension is strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def most_pairs(tokens: int, max_seqlen: int, window: int) -> int:
    """Unmasked pairs if every segment were as long as the longest; an upper bound otherwise."""
    longest = max(1, min(tokens, max_seqlen))
    reach = min(longest, window or longest)
    return tokens * (reach * (reach + 1) // 2 + (longest - reach) * reach) // longest


@register_flop_formula(getattr(torch.ops, NAMESPACE).varlen_attention)
def attention_flops(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    rows_shape: Sequence[int],
    columns_shape: Sequence[int],
    config: Sequence[int],
    max_seqlen: int,
    scale: float,
    window: int,
    softcap: float,
    backend: str,
    out_shape: Any = None,
) -> int:
    """4 FLOPs a pair, head and dimension.

    How many pairs the borders leave is known only on the device; without asking it, the bound by
    ``max_seqlen`` is counted, which is exact for segments of equal length.
    """
    tokens, heads, size = q_shape
    return 4 * heads * size * most_pairs(tokens, max_seqlen, window)


@register_flop_formula(getattr(torch.ops, NAMESPACE).varlen_attention_backward)
def attention_backward_flops(
    q_shape: Sequence[int],
    *rest: Any,
    out_shape: Any = None,
) -> int:
    """10 FLOPs a pair, head and dimension: five products, recomputation counted once."""
    max_seqlen, _, window, _, _ = rest[-5:]
    tokens, heads, size = q_shape
    return 10 * heads * size * most_pairs(tokens, max_seqlen, window)
