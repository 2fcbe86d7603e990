"""The names of Gluon that the sm_90 kernels use, the same for triton 3.6 and 3.9.

Kernels import Gluon from here only: what was renamed between the versions is settled in one place,
and the tests run the same kernel source on a model of the machine by putting another module here.
"""

from __future__ import annotations

from typing import Any

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = [
    "TensorDescriptor",
    "fence_async_shared",
    "gl",
    "gluon",
    "mbarrier",
    "tma_add",
    "tma_load",
    "tma_store_wait",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]

tma_store_wait = tma.store_wait
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@builtin
def tma_add(tensor_desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
    """Add a tile in shared memory to global memory; triton 3.6 has no name for it."""
    place = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, place, src.handle)
