"""The names of Gluon that the sm_90 kernels use, the same for triton 3.6 and 3.9.

Kernels import Gluon from here only: what was renamed between the versions is settled in one place,
and the tests run the same kernel source on a model of the machine by putting another module here.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
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
    "tma_load",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]

tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
