"""Causal attention over a packed token axis in which a token sees only its own segment."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .flex import flex_document_attention
from .libraries import cudnn_fits, cudnn_refusal, flash_attn_attention, library_attention
from .op import OURS, gluon_refusal, interpreted, triton_attention, triton_refusal
from .reference import reference_attention
from .sdpa import torch_attention
from .tile_scheduler import Tiles

Backend = Literal[
    "auto",
    "flash",
    "cudnn",
    "flash_attn",
    "flex",
    "triton",
    "gluon",
    "gluon_split",
    "torch",
    "reference",
]

HALF = (torch.float16, torch.bfloat16)
NEEDS_HALF = ("flash", "cudnn", "flash_attn", *OURS)

# Options a backend does not have.
LACKS = {
    "flash": ("softcap", "return_lse"),
    "cudnn": ("cu_seqlens_k", "window", "softcap", "return_lse"),
    "flash_attn": ("return_lse",),
    "flex": ("cu_seqlens_k", "return_lse"),
    "triton": (),
    "gluon": ("window", "softcap"),
    "gluon_split": ("window", "softcap"),
    "torch": ("cu_seqlens_k", "window", "softcap", "return_lse"),
    "reference": (),
}


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    return_lse: Literal[False] = False,
    backend: Backend = "auto",
    tiles: Tiles | BlockMask | None = None,
) -> Tensor: ...


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    return_lse: Literal[True],
    backend: Backend = "auto",
    tiles: Tiles | BlockMask | None = None,
) -> tuple[Tensor, Tensor]: ...


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
    backend: Backend = "auto",
    tiles: Tiles | BlockMask | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Document-masked causal attention.

    Args:
        q: ``[Tq, Hq, Dh]``.
        k: ``[Tk, Hkv, Dh]``; ``Hq`` is a multiple of ``Hkv`` (grouped-query attention).
        v: ``[Tk, Hkv, Dh]``.
        cu_seqlens: int32 ``[S+1]`` segment borders of the queries; zero-length segments allowed.
        max_seqlen: upper bound of the segment lengths.
        cu_seqlens_k: borders of the keys where they differ; causality is aligned at segment ends.
        max_seqlen_k: upper bound of the keys of a segment where it differs.
        scale: factor of the scores; default ``Dh ** -0.5``.
        window: sliding window in tokens, the query itself included; None for all.
        softcap: ``softcap * tanh(scores / softcap)``; 0 for none.
        return_lse: also return the log-sum-exp of the scores, fp32 ``[Hq, Tq]``, natural log.
        backend: ``cudnn`` (PyTorch's varlen_attn by cuDNN, where segments x longest is at most
            twice the tokens), ``flash`` (the same by FlashAttention), both in half precision on
            CUDA, ``torch`` (SDPA per segment), ``reference`` (quadratic, every option, any dtype),
            or ``auto``: the first of these that can do what is asked. Only when asked for:
            ``triton`` (our kernels with every option, half precision on CUDA; deterministic),
            ``gluon_split`` (warp-specialised kernels for sm_90 and head dimensions 64, 96 and
            128, without window and softcap; deterministic), ``gluon`` (the same with a backward
            pass that is faster on long segments and adds to dQ in any order), ``flash_attn`` (the
            flash-attn package), ``flex`` (FlexAttention; no backward pass on a CPU).
            ``kernels/check`` says which of them are right on a GPU, and which is the fastest.
        tiles: of :func:`kernels.attention_tiles` for our own kernels, of ``document_block_mask``
            for ``flex``; made in each call if None.

    Returns:
        ``[Tq, Hq, Dh]``; 0 with gradient 0 for tokens after the last border.

    Raises:
        ValueError: shapes or options that do not fit, naming them.
    """
    check_shapes(q, k, v, cu_seqlens, cu_seqlens_k)
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1: a token sees itself; None for all")
    if softcap < 0:
        raise ValueError(f"softcap={softcap} must be positive, or 0 for none")
    made_for = ("flex",) if isinstance(tiles, BlockMask) else OURS
    if tiles is not None and backend not in made_for:
        raise ValueError(f"these tiles are for backend={' or '.join(made_for)}, not {backend!r}")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    asked = {
        "cu_seqlens_k": cu_seqlens_k is not None,
        "window": window is not None,
        "softcap": softcap != 0,
        "return_lse": return_lse,
    }
    segments, tokens = len(cu_seqlens) - 1, q.shape[0]
    if backend == "auto":
        fits = cudnn_fits(segments, max_seqlen, tokens)
        backend = automatic_backend(q.device, q.dtype, q.shape[2], fits, asked)
    if backend not in LACKS:
        raise ValueError(f"backend={backend!r} is not one of auto, {', '.join(LACKS)}")
    if missing := lacking(backend, asked):
        raise ValueError(
            f"backend={backend!r} has no {', '.join(missing)}; use backend='reference'"
        )
    check_backend(backend, q.device, q.dtype, q.shape[2])
    if backend == "cudnn" and not cudnn_fits(segments, max_seqlen, tokens):
        raise ValueError(
            f"backend='cudnn' would hold {segments} segments x {max_seqlen} tokens for {tokens} "
            "tokens, more than twice as many; use backend='flash'"
        )
    if backend in ("flash", "cudnn"):
        return library_attention(
            q, k, v, cu_seqlens, max_seqlen, scale, window, cu_seqlens_k, max_seqlen_k, backend
        )
    if backend == "flash_attn":
        return flash_attn_attention(
            q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, scale, window, softcap, max_seqlen_k
        )
    if backend == "flex":
        mask = tiles if isinstance(tiles, BlockMask) else None
        return flex_document_attention(q, k, v, cu_seqlens, scale, window, softcap, mask)
    if backend == "torch":
        attended: Tensor = torch_attention(q, k, v, cu_seqlens, scale)
        return attended
    if backend in OURS:
        assert not isinstance(tiles, BlockMask)
        out, lse = triton_attention(
            q,
            k,
            v,
            cu_seqlens,
            max_seqlen,
            cu_seqlens_k,
            scale,
            window,
            softcap,
            tiles,
            backend,
        )
        return (out, lse) if return_lse else out
    keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    out, lse = reference_attention(q, k, v, cu_seqlens, keys, scale, window, softcap)
    return (out, lse.float()) if return_lse else out


def automatic_backend(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    fits: bool,
    asked: dict[str, bool] | None = None,
) -> Backend:
    """What ``auto`` is for these inputs.

    Args:
        device: of the inputs.
        dtype: of the inputs.
        head_dim: size of a head.
        fits: whether segments x longest is at most twice the tokens.
        asked: which options are used.
    """
    half = device.type == "cuda" and dtype in HALF
    options = asked or dict.fromkeys(("cu_seqlens_k", "window", "softcap", "return_lse"), False)
    if (
        half
        and fits
        and not lacking("cudnn", options)
        and refusal("cudnn", device, head_dim) is None
    ):
        return "cudnn"
    if half and not lacking("flash", options):
        return "flash"
    return "reference" if lacking("torch", options) else "torch"


def check_backend(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, heads: str = "q"
) -> None:
    """Raise ValueError where a backend cannot run, before anything is built for it.

    Args:
        backend: not ``auto``.
        device: where it would run; Triton's interpreter stands in for CUDA.
        dtype: of the inputs.
        head_dim: size of a head.
        heads: what the message calls the inputs.
    """
    interpreter = backend == "triton" and device.type == "cpu" and interpreted()
    if backend in NEEDS_HALF and not interpreter and (device.type != "cuda" or dtype not in HALF):
        raise ValueError(
            f"backend={backend!r} needs float16 or bfloat16 on CUDA, {heads} is {dtype} on "
            f"{device}; use backend='auto'"
        )
    if why := refusal(backend, device, head_dim):
        raise ValueError(f"backend={backend!r} cannot run here: {why}; use backend='auto'")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def refusal(backend: str, device: torch.device, head_dim: int) -> str | None:
    """Why a backend cannot run on a device with this head dimension, or None."""
    if backend == "cudnn":
        return cudnn_refusal(device, head_dim)
    if backend in ("gluon", "gluon_split"):
        return gluon_refusal(device, head_dim)
    if backend == "triton":
        return triton_refusal(device, head_dim)
    if backend == "flash" and (head_dim > 256 or head_dim % 8):
        return f"it has head dimensions up to 256 in multiples of 8, not {head_dim}"
    return None


def lacking(backend: str, asked: dict[str, bool]) -> list[str]:
    """The options that are asked for and that a backend does not have."""
    return [option for option in LACKS[backend] if asked[option]]


def check_shapes(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None
) -> None:
    """Raise ValueError naming the first argument whose shape does not fit the others."""
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ValueError(
            f"q, k, v must be [T, H, Dh], not {[*q.shape]}, {[*k.shape]}, {[*v.shape]}"
        )
    if k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q {[*q.shape]}, k {[*k.shape]}, v {[*v.shape]}: k and v must agree in tokens and "
            "heads, q and k in the head dimension"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    if cu_seqlens_k is None and q.shape[0] != k.shape[0]:
        raise ValueError(f"{q.shape[0]} query tokens and {k.shape[0]} key tokens need cu_seqlens_k")
    for name, borders in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        if borders is not None and (borders.dim() != 1 or len(borders) < 2):
            raise ValueError(f"{name} must be [S+1] with S >= 1, not {[*borders.shape]}")
    if cu_seqlens_k is not None and len(cu_seqlens_k) != len(cu_seqlens):
        raise ValueError(
            f"cu_seqlens has {len(cu_seqlens)} borders and cu_seqlens_k {len(cu_seqlens_k)}; "
            "each segment needs both"
        )
