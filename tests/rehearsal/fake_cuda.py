"""A PyTorch that believes in an H100: shapes, dtypes and graphs of the GPU path without a GPU.

Import this first, in a process that was started with :func:`tests.rehearsal.test_rehearsal.run`.
Tensors on ``cuda`` exist as fake tensors only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses import fake_tensor

PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=85_017_034_752,
    regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    gcnArchName="",
    shared_memory_per_block=49_152,
    shared_memory_per_block_optin=232_448,
    shared_memory_per_multiprocessor=233_472,
    L2_cache_size=50 << 20,
    uuid="0",
    is_integrated=False,
    pci_bus_id=0,
    pci_device_id=0,
    pci_domain_id=0,
)


class Stream:
    """A stream or an event: nothing is ever waited for."""

    cuda_stream = stream_id = device_index = 0
    device_type = 1
    device = torch.device("cuda", 0)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def nothing(self, *arguments: Any, **options: Any) -> None:
        pass

    wait_stream = wait_event = wait = record = synchronize = nothing

    def record_event(self, *arguments: Any) -> Stream:
        return self


def constant(value: Any) -> Any:
    return lambda *arguments, **options: value


def install() -> None:
    """Make ``torch.cuda`` answer as on an H100."""
    getattr(torch._C, "_ensureCUDADeviceGuardSet")()  # noqa: B009
    ctypes.CDLL(os.environ["FAKE_DEVICES"]).set_fake_device_count(64)  # after the guard is set
    setattr(fake_tensor, "init_gpu_context", constant(None))  # noqa: B010
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "_lazy_init": None,
        "get_device_properties": PROPERTIES,
        "get_device_capability": (9, 0),
        "get_device_name": PROPERTIES.name,
        "is_bf16_supported": True,
        "memory_allocated": 0,
        "synchronize": None,
        "current_stream": Stream(),
        "stream": contextlib.nullcontext(),
        "is_current_stream_capturing": False,
        "set_rng_state": None,
        "set_device": None,
        "get_rng_state_all": [],
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, constant(value))
    for name in ("Stream", "Event"):
        setattr(torch.cuda, name, Stream)
    for module in (torch.cuda, torch.cuda.random):
        setattr(module, "get_rng_state", lambda *a, **k: torch.zeros(16, dtype=torch.uint8))  # noqa: B010
        setattr(module, "set_rng_state", constant(None))  # noqa: B010
    setattr(torch.cuda.graphs, "is_current_stream_capturing", constant(False))  # noqa: B010


install()
