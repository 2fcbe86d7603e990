"""Attention of libraries: FlashAttention and cuDNN through PyTorch's ``varlen_attn``, and the
flash-attn package where it is installed.

PyTorch chooses between its two by itself and prefers cuDNN on sm_90 and sm_100, so each is named
here and the other one switched off.
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen

# PyTorch 2.11 has fewer arguments than later versions, and FlashAttention only.
HAS_GQA = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters
HAS_CUDNN = hasattr(varlen, "_select_backend")
CUDNN_VERSION = 92_500  # 9.25; earlier ones give NaN for segments of length 0
LIBRARIES = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def library_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    library: Literal["flash", "cudnn"] = "flash",
) -> Tensor:
    """Causal attention inside each segment by PyTorch's FlashAttention or cuDNN.

    The library leaves tokens after the last border unwritten, in the output as in the gradients, so
    both are replaced by 0 here; there is no synchronisation.

    Args:
        q: ``[T, Hq, Dh]``, float16 or bfloat16 on CUDA.
        k: ``[T, Hkv, Dh]``.
        v: ``[T, Hkv, Dh]``.
        cu_seqlens: int32 ``[S+1]``.
        max_seqlen: upper bound of the segment lengths.
        scale: factor of the scores.
        window: keys a query sees, itself included; None for all.
        cu_seqlens_k: borders of the keys where they differ; causality is aligned at segment ends.
        max_seqlen_k: upper bound of the keys of a segment where it differs.
        library: which one.

    Returns:
        ``[T, Hq, Dh]``.
    """
    inside = (torch.arange(q.shape[0], device=q.device) < cu_seqlens[-1])[:, None, None]
    borders_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    inside_k = (torch.arange(k.shape[0], device=k.device) < borders_k[-1])[:, None, None]
    q, k, v = torch.where(inside, q, 0), torch.where(inside_k, k, 0), torch.where(inside_k, v, 0)
    if not HAS_GQA:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    options: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]} if HAS_GQA else {}
    left = -1 if window is None else window - 1
    with sdpa_kernel(LIBRARIES[library]):
        out = varlen.varlen_attn(
            q,
            k,
            v,
            cu_seqlens,
            borders_k,
            max_seqlen,
            max_seqlen if max_seqlen_k is None else max_seqlen_k,
            scale=scale,
            window_size=(left, 0),
            **options,
        )
    assert isinstance(out, Tensor)  # without return_aux there is no log-sum-exp beside it
    return torch.where(inside, out, 0)


def cudnn_refusal(device: torch.device, head_dim: int) -> str | None:
    """Why cuDNN cannot be used on a CUDA device, or None."""
    if not HAS_CUDNN:
        return f"PyTorch {torch.__version__} has no cuDNN in varlen_attn (2.15 has)"
    version = torch.backends.cudnn.version() or 0
    if version < CUDNN_VERSION:
        return (
            f"cuDNN {version} gives NaN for segments of length 0; 9.25 is the first that does not"
        )
    if torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return "its variable-length kernels are for sm_90 and sm_100"
    if head_dim > 128 or head_dim % 8:
        return f"it has head dimensions up to 128 in multiples of 8, not {head_dim}"
    return None


def has_flash_attn() -> bool:
    """Whether the flash-attn package is installed."""
    return importlib.util.find_spec("flash_attn") is not None


def cudnn_fits(segments: int, max_seqlen: int, tokens: int) -> bool:
    """Whether cuDNN's workspace stays small: its backward pass holds segments x longest rows."""
    return segments * max_seqlen <= 2 * tokens


def flash_attn_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_seqlens_k: Tensor | None,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    max_seqlen_k: int | None = None,
) -> Tensor:
    """The same through ``flash_attn.flash_attn_varlen_func``.

    Args:
        q: ``[Tq, Hq, Dh]``, float16 or bfloat16 on CUDA.
        k: ``[Tk, Hkv, Dh]``.
        v: ``[Tk, Hkv, Dh]``.
        cu_seqlens: int32 ``[S+1]``.
        max_seqlen: upper bound of the segment lengths.
        cu_seqlens_k: borders of the keys where they differ.
        scale: factor of the scores.
        window: keys a query sees, itself included; None for all.
        softcap: 0 for none.
        max_seqlen_k: upper bound of the keys of a segment where it differs.

    Returns:
        ``[Tq, Hq, Dh]``.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise ValueError(
            "backend='flash_attn' needs the flash-attn package "
            "(pip install --no-build-isolation flash-attn); use backend='flash' for PyTorch's own"
        ) from error
    keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    inside = (torch.arange(q.shape[0], device=q.device) < cu_seqlens[-1])[:, None, None]
    inside_k = (torch.arange(k.shape[0], device=q.device) < keys[-1])[:, None, None]
    out: Tensor = flash_attn_varlen_func(
        torch.where(inside, q, 0),
        torch.where(inside_k, k, 0),
        torch.where(inside_k, v, 0),
        cu_seqlens,
        keys,
        max_seqlen,
        max_seqlen if max_seqlen_k is None else max_seqlen_k,
        softmax_scale=scale,
        causal=True,
        window_size=(-1 if window is None else window - 1, 0),
        softcap=softcap,
    )
    return torch.where(inside, out, 0)
