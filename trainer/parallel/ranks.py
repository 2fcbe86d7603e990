"""Ranks, devices and the wrappers that make one model run on many of them.

Parallelism is applied from outside: the model knows nothing of it.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.nn.parallel import DistributedDataParallel

from trainer.config.schema import Parallel, RuntimeConfig
from trainer.model.llama import Llama
from trainer.parallel.context_parallel import apply_context_parallel
from trainer.parallel.slurm import own_device_only, ranks_of_step

# None is: see parallelize.
warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")

Value = TypeVar("Value")

JOIN_TIMEOUT = timedelta(minutes=10)  # also that of a collective


@dataclass(frozen=True)
class Ranks:
    """This process among its peers.

    ``context_parallel`` neighbouring ranks work on the same windows; ``data_rank`` and
    ``data_size`` count such groups.
    """

    rank: int
    world_size: int
    device: torch.device
    context_parallel: int = 1
    context_group: dist.ProcessGroup | None = None
    host_group: dist.ProcessGroup | None = None  # gloo, beside that of the devices

    @property
    def data_rank(self) -> int:
        return self.rank // self.context_parallel

    @property
    def data_size(self) -> int:
        return self.world_size // self.context_parallel

    @property
    def context_rank(self) -> int:
        return self.rank % self.context_parallel

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum ``tensor`` over all ranks in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_on_hosts(self, value: int) -> int:
        """Sum ``value`` over all ranks, which must call this together; no device is waited for."""
        if self.host_group is None:
            return value
        total = torch.tensor(int(value))
        dist.all_reduce(total, group=self.host_group)
        return int(total)

    def max_on_hosts(self, *values: int) -> list[int]:
        """Largest of every value over all ranks, which must call this together."""
        if self.host_group is None:
            return list(values)
        largest = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.host_group)
        return largest.tolist()

    def from_main(self, value: Callable[[], Value]) -> Value:
        """What ``value`` returns on the first rank, on every rank; they must call this together."""
        if self.host_group is None:
            return value()
        found: list[Any] = [value() if self.is_main else None]
        dist.broadcast_object_list(found, group=self.host_group)
        told: Value = found[0]
        return told

    def gather_on_hosts(self, value: Value) -> list[Value]:
        """What every rank gives, by rank; all ranks must call this together."""
        if self.host_group is None:
            return [value]
        found: list[Any] = [None] * self.world_size  # filled in place
        dist.all_gather_object(found, value, group=self.host_group)
        return found

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


@contextlib.contextmanager
def join_ranks(config: RuntimeConfig) -> Iterator[Ranks]:
    """Join the process group that torchrun or Slurm's step describes, or run alone without one."""
    os.environ.update(ranks_of_step(os.environ))
    device = choose_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    for name, size in (
        ("runtime.context_parallel", config.context_parallel),
        ("runtime.shard_size", config.shard_size or world_size),
    ):
        if world_size % size:
            raise ValueError(
                f"{name}={size} does not divide the {world_size} ranks; start a multiple of it "
                "with torchrun --nproc-per-node or srun --ntasks"
            )
    if world_size == 1:
        yield Ranks(0, 1, device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    store, rank, _ = next(dist.rendezvous("env://"))
    store = unused_part(store, rank, world_size, JOIN_TIMEOUT)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=JOIN_TIMEOUT
    )
    try:
        yield Ranks(
            dist.get_rank(),
            world_size,
            device,
            config.context_parallel,
            context_group(config.context_parallel),
            dist.new_group(backend="gloo"),  # type: ignore[arg-type]
        )
    finally:
        dist.destroy_process_group()


def unused_part(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """A part of ``store`` that nothing was written to before these ranks met.

    torchrun keeps its store over elastic restarts, with the addresses of the processes that died,
    and its restart count differs between nodes: a node counts only what failed on itself. So each
    rank shows a token nobody used before, and rank 0 answers it with the name of the part.

    Raises:
        TimeoutError: not all ranks came; names those that are missing.
    """
    store.set_timeout(timeout)
    if rank > 0:
        token = uuid.uuid4().hex
        store.set(f"token-{rank}", token)
        name = store.get(token).decode()
        store.set(f"{name}-has-{rank}", "")
        return dist.PrefixStore(name, store)

    name = uuid.uuid4().hex
    missing = list(range(1, world_size))
    deadline = time.monotonic() + timeout.total_seconds()
    while missing:
        for other in missing:
            if store.check([f"token-{other}"]):  # perhaps that of an earlier attempt
                store.set(store.get(f"token-{other}").decode(), name)
        missing = [other for other in missing if not store.check([f"{name}-has-{other}"])]
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {missing} of {world_size} have not joined within {timeout}")
        time.sleep(0.05)
    return dist.PrefixStore(name, store)


def context_group(size: int) -> dist.ProcessGroup | None:
    """The ranks that share this rank's windows, or None where every rank has its own."""
    if size == 1:
        return None
    group, _ = dist.new_subgroups(size)
    return group


def choose_device(name: str) -> torch.device:
    """``auto`` is this rank's CUDA device, or the CPU where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("runtime.device=cuda, but PyTorch sees no CUDA device")
        index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if own_device_only():
            index = 0
        if index >= count:
            raise ValueError(
                f"process {index} of this node has no device of its own: PyTorch sees {count}; "
                f"start at most {count} with torchrun --nproc-per-node"
            )
        return torch.device("cuda", index)
    if name != "cpu":
        raise ValueError(
            f"runtime.device={name} is not auto, cuda or cpu; CUDA_VISIBLE_DEVICES chooses a GPU"
        )
    return torch.device(name)


def parallelize(model: Llama, ranks: Ranks, config: RuntimeConfig) -> nn.Module:
    """Shard or replicate ``model`` over the ranks; alone it is returned as it is."""
    if ranks.world_size == 1:
        return model
    if ranks.context_group is not None:
        apply_context_parallel(model, ranks.context_group)
    if config.parallel is Parallel.fsdp:
        mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        if config.shard_size:
            copies = ranks.world_size // config.shard_size
            shape = (copies, config.shard_size)
            mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=("copy", "shard"))
        policy = MixedPrecisionPolicy(
            param_dtype=model.compute_dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # the rotary tables of the blocks stay fp32
        )
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(model, "token_losses")  # gathers the weights, as forward does
        return model
    device_ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    # DDP lays its buckets out anew after the first step of a process, so a run that goes on would
    # round the sums of its first step differently. It does not where a parameter may be unused.
    return DistributedDataParallel(
        model,
        device_ids=device_ids,
        gradient_as_bucket_view=True,
        find_unused_parameters=True,
    )


def last_backward(model: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    """Postpone the exchange of gradients to the last micro-batch of a step."""
    if isinstance(model, DistributedDataParallel) and not is_last:
        return model.no_sync()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
    return contextlib.nullcontext()
