"""Stands in for SGLang's compiled kernels, which exist for GPUs and for CPUs with AVX-512 only.

SGLang imports functions called ``*_cpu`` from here wherever it runs on a CPU, but calls them only
with AMX or for speculative decoding; PyTorch does the rest. ``make sglang`` copies this file into
SGLang's environment.
"""

from collections.abc import Callable
from typing import Any, NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if not name.endswith("_cpu"):
        raise AttributeError(f"the stand-in for SGLang's compiled kernels has no {name}")

    def not_compiled(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} exists only in SGLang's compiled kernels")

    return not_compiled
