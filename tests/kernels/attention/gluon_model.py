"""A model of one Hopper multiprocessor that runs the Gluon kernels' own source on a CPU.

It stands in for ``kernels.attention.sm90.gluon_compat``. Warps of a specialised region are threads;
barriers have arrivals, bytes and phases; a TMA copy first spoils its target with NaN and arrives
later, in any order; who arrives at a barrier stalls so that others go ahead; a matrix product and
an addition to memory compare their operands when they are issued and when they are waited for, and
refuse what was stored without a fence. So a wait that is missing shows as NaN, a buffer that is
given back too early as a changed operand, and a wrong phase as a deadlock.
Registers, layouts and instructions are not modelled: the compile-only tests look at those.
"""

from __future__ import annotations

import random
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

DEADLOCK_SECONDS = 30
BARRIER = "barrier"
machine = SimpleNamespace(program=0, programs=1, changed=threading.Condition(), failed=False)
pending = threading.local()  # what this warpgroup has issued, and stored without a fence


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all announced bytes have come."""

    def __init__(self) -> None:
        self.count = self.arrivals = self.bytes = self.phase = 0

    def update(self, arrivals: int, size: int) -> None:
        with machine.changed:
            self.arrivals -= arrivals
            self.bytes += size
            assert self.arrivals >= 0, "more arrivals than the barrier was made for"
            if self.arrivals == 0 and self.bytes == 0:
                self.phase ^= 1
                self.arrivals = self.count
                machine.changed.notify_all()

    def wait(self, phase: int) -> None:
        with machine.changed:
            done = machine.changed.wait_for(
                lambda: self.phase != int(phase) or machine.failed, DEADLOCK_SECONDS
            )
            if machine.failed or not done:
                raise RuntimeError("deadlock: a barrier's phase did not end")


class Barriers:
    def __init__(self, count: int) -> None:
        self.barriers = [Barrier() for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        return self.barriers[int(i)]


class Shared:
    """Shared memory: a view that products and copies use."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.dtype = data.dtype

    def index(self, i: Any) -> Shared:
        return Shared(self.data[int(i)])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.data.view(shape))

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)
        unfenced().add(self.data.untyped_storage().data_ptr())

    def load(self, layout: Any) -> Tensor:
        return self.data.clone()


def unfenced() -> set[int]:
    """Buffers that this warpgroup has stored to and the asynchronous proxy cannot see yet."""
    if not hasattr(pending, "unfenced"):
        pending.unfenced = set()
    stored: set[int] = pending.unfenced
    return stored


def check_fenced(operand: Shared) -> None:
    stored = operand.data.untyped_storage().data_ptr() in unfenced()
    assert not stored, "read by the asynchronous proxy without a fence"


class Pointer:
    def __init__(self, data: Tensor, offset: Any = 0) -> None:
        self.data, self.offset = data, offset
        self.dtype = SimpleNamespace(element_ty=data.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.offset + offset)


class TensorDescriptor:
    """What TMA knows of a tensor; coordinates outside its shape read 0."""

    def __init__(
        self, base: Tensor, shape: list[int], strides: list[int], block: list[int], layout: Any
    ) -> None:
        self.base, self.shape, self.strides, self.block = base, shape, strides, block
        self.dtype, self.layout = base.dtype, layout
        self.block_type = SimpleNamespace(nbytes=int(np.prod(block)) * base.element_size())
        self.memory = torch.empty(0, dtype=base.dtype).set_(base.untyped_storage())

    def places(self, corner: list[Any]) -> tuple[Tensor, Tensor]:
        """Where the elements of a block lie in memory, and which exist."""
        address = np.zeros([1] * len(self.block), np.uint64)
        inside = np.ones([1] * len(self.block), bool)
        for axis, (start, size) in enumerate(zip(corner, self.block, strict=True)):
            place = [1] * len(self.block)
            place[axis] = size
            at = (int(start) + np.arange(size)).reshape(place)
            inside = inside & (at >= 0) & (at < self.shape[axis])
            # The address wraps around as it does in the machine.
            stride = np.uint64(self.strides[axis])
            with np.errstate(over="ignore"):
                address = address + at.astype(np.int64).astype(np.uint64) * stride
        address = np.where(inside, address + np.uint64(self.base.storage_offset()), 0)
        return torch.from_numpy(address.astype(np.int64)), torch.from_numpy(inside)

    def read(self, corner: list[Any]) -> Tensor:
        address, inside = self.places(corner)
        return torch.where(inside, self.memory[address], 0)

    def add(self, corner: list[Any], values: Tensor) -> None:
        address, inside = self.places(corner)
        self.memory.index_add_(0, address[inside], values[inside])


def tma_load(desc: TensorDescriptor, corner: list[Any], barrier: Barrier, target: Shared) -> None:
    target.data.fill_(torch.nan)
    place = [int(x) for x in corner]
    threading.Thread(target=copy, args=(desc, place, barrier, target), daemon=True).start()


@torch.no_grad()
def copy(desc: TensorDescriptor, corner: list[int], barrier: Barrier, target: Shared) -> None:
    stall()
    target.data.copy_(desc.read(corner))
    barrier.update(0, -desc.block_type.nbytes)


def tma_add(desc: TensorDescriptor, corner: list[Any], source: Shared) -> None:
    """Reads its source at some time until it is waited for."""
    check_fenced(source)
    addition = Addition(desc, [int(x) for x in corner], source)
    pending.additions = [*getattr(pending, "additions", []), addition]


class Addition(threading.Thread):
    def __init__(self, desc: TensorDescriptor, corner: list[int], source: Shared) -> None:
        super().__init__(daemon=True)
        self.desc, self.corner, self.source = desc, corner, source
        self.issued = source.data.clone()
        self.same = False
        self.start()

    @torch.no_grad()
    def run(self) -> None:
        stall()
        self.same = torch.equal(self.source.data.nan_to_num(), self.issued.nan_to_num())
        with machine.changed:
            self.desc.add(self.corner, self.issued)


def tma_store_wait(outstanding: int) -> None:
    additions = getattr(pending, "additions", [])
    while len(additions) > outstanding:
        addition = additions.pop(0)
        addition.join()
        assert addition.same, "overwritten before it was added"


def stall() -> None:
    """Let others go ahead."""
    time.sleep(4e-3 * random.random())


def arrive(barrier: Barrier) -> None:
    barrier.update(1, 0)
    stall()


class Product:
    """An asynchronous product; its operands must not change until it is waited for."""

    def __init__(self, a: Any, b: Shared, acc: Any, use_acc: bool) -> None:
        self.operands = [x for x in (a, b) if isinstance(x, Shared)]
        for operand in self.operands:
            check_fenced(operand)
        self.issued = [x.data.clone() for x in self.operands]
        acc = acc.result if isinstance(acc, Product) else acc  # products finish in order
        left = self.issued[0] if isinstance(a, Shared) else a
        self.result: Tensor = left.float() @ self.issued[-1].float() + (acc if use_acc else 0)
        self.value: Tensor | None = None

    def finish(self) -> None:
        for now, then in zip(self.operands, self.issued, strict=True):
            assert torch.equal(now.data.nan_to_num(), then.nan_to_num()), "overwritten while read"
        self.value = self.result


def warpgroup_mma(
    a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False
) -> Product:
    assert is_async
    issued = Product(a, b, acc, use_acc)
    pending.list = [*getattr(pending, "list", []), issued]
    return issued


def warpgroup_mma_wait(outstanding: int, deps: tuple[Any, ...]) -> Any:
    while len(pending.list) > outstanding:
        pending.list.pop(0).finish()
    values = [x.value if isinstance(x, Product) and x.value is not None else x for x in deps]
    return tuple(values) if len(values) > 1 else values[0]


def fence_async_shared() -> None:
    unfenced().clear()


def warp_specialize(parts: list[Any], warps: list[int], registers: list[int]) -> None:
    failures: list[BaseException] = []

    @torch.no_grad()
    def run(function: Any, arguments: Any) -> None:
        try:
            function(*arguments)
            assert not getattr(pending, "list", []), "a product that nobody has waited for"
            assert not getattr(pending, "additions", []), "an addition that nobody has waited for"
        except BaseException as error:
            failures.append(error)
            with machine.changed:
                machine.failed = True
                machine.changed.notify_all()

    threads = [threading.Thread(target=run, args=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def allocate_shared_memory(dtype: Any, shape: list[int], layout: Any) -> Any:
    if layout == BARRIER:
        return Barriers(shape[0]) if len(shape) > 1 else Barrier()
    return Shared(torch.full(shape, torch.nan, dtype=dtype))


def start_barrier(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.arrivals = count


def load(pointer: Pointer, mask: Any = None, other: float = 0.0) -> Tensor:
    if mask is None:
        return pointer.data[pointer.offset]
    at, mask = torch.broadcast_tensors(pointer.offset, mask)
    return torch.where(mask, pointer.data[torch.where(mask, at, 0)], other)


def store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    at, value, mask = torch.broadcast_tensors(pointer.offset, value, mask)
    pointer.data[at[mask]] = value[mask]


class Kernel:
    """``kernel[(programs,)](...)`` runs the programs one after the other."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(
            *arguments: Any, num_warps: int, enable_fp_fusion: bool, **constants: Any
        ) -> None:
            wrapped = [Pointer(x.view(-1)) if isinstance(x, Tensor) else x for x in arguments]
            machine.programs, machine.failed = grid[0], False
            for machine.program in range(grid[0]):
                self.function(*wrapped, **constants)

        return launch


def pair(function: Any) -> Any:
    return lambda a, b: function(torch.as_tensor(a), torch.as_tensor(b))


def nothing(*arguments: Any, **options: Any) -> None:
    """Layouts do not exist here."""


def jit(function: Any = None, **options: Any) -> Any:
    """``gluon.jit`` with options and without."""
    return Kernel if function is None else Kernel(function)


gluon = SimpleNamespace(jit=jit, constexpr_function=lambda function: function)
mbarrier = SimpleNamespace(
    MBarrierLayout=lambda: BARRIER,
    init=start_barrier,
    wait=lambda barrier, phase: barrier.wait(phase),
    arrive=arrive,
    expect=lambda barrier, size: barrier.update(1, size),
)
gl = SimpleNamespace(
    program_id=lambda axis: torch.tensor(machine.program),
    num_programs=lambda axis: torch.tensor(machine.programs),
    minimum=pair(torch.minimum),
    maximum=pair(torch.maximum),
    where=torch.where,
    max=lambda x, axis: x.amax(axis),
    sum=lambda x, axis: x.sum(axis),
    exp2=torch.exp2,
    log2=torch.log2,
    load=load,
    store=store,
    arange=lambda start, end, layout: torch.arange(start, end),
    full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    convert_layout=lambda x, layout: x,
    static_range=range,
    allocate_shared_memory=allocate_shared_memory,
    warp_specialize=warp_specialize,
    SliceLayout=nothing,
    BlockedLayout=nothing,
    SwizzledSharedLayout=nothing,
    DotOperandLayout=nothing,
    NVMMADistributedLayout=nothing,
    NVMMASharedLayout=SimpleNamespace(get_default_for=nothing),
    float32=torch.float32,
    int64=torch.int64,
    bfloat16=torch.bfloat16,
    float16=torch.float16,
)
