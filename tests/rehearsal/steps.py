"""Trace steps of the real models on fake CUDA tensors; prints one JSON line a case.

``python -m tests.rehearsal.steps CASE...``, each case ``model,tokens,context,attention,mode,way``:
``way`` is compile, fsdp, cp, or eager, which says the peak memory beside the estimate and may be
followed by a number of layers.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks.train_step import model_config
from kernels.attention import flex
from tests.rehearsal import fake_cuda  # noqa: F401  must come first
from trainer.config.schema import (
    ActivationCheckpointing,
    AttentionBackend,
    DataConfig,
    Parallel,
    RuntimeConfig,
    TrainConfig,
)
from trainer.model.llama import KernelBackends, Llama
from trainer.parallel import ranks as ranks_module
from trainer.parallel.activation_checkpointing import recompute_blocks, step_bytes
from trainer.parallel.context_parallel import apply_context_parallel
from trainer.parallel.ranks import Ranks, parallelize

VOCABULARY = 128_256
PACKS = 50


class Graphs:
    """What a compiler would be handed: graphs forward and backward, attention in each."""

    def __init__(self) -> None:
        self.forward: list[list[str]] = []
        self.backward: list[list[str]] = []
        self.backend = aot_autograd(
            fw_compiler=lambda graph, inputs: self.keep(self.forward, graph),
            bw_compiler=lambda graph, inputs: self.keep(self.backward, graph),
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )

    def keep(self, where: list[list[str]], graph: Any) -> Any:
        calls = []
        for node in graph.graph.nodes:
            name = str(node.target)
            if node.op == "call_function" and ("varlen_att" in name or "flex_att" in name):
                library = node.kwargs.get("backend", node.args[14] if len(node.args) > 14 else "")
                calls.append(f"{name} {library}".strip())
        where.append(calls)
        return graph


def build(name: str, attention: str, layers: int | None) -> Llama:
    """The model on the fake device; weights have no values to draw."""
    for name_ in ("kaiming_uniform_", "normal_"):
        setattr(torch.nn.init, name_, lambda tensor, *a, **k: tensor)
    setattr(Llama, "reset_parameters", lambda self, seed: None)  # noqa: B010
    # Compiling the mask, which is no part of the blocks, would generate code for the device.
    setattr(flex, "block_mask_maker", lambda fused: create_block_mask)  # noqa: B010
    config = model_config(name, VOCABULARY)
    config.num_layers = layers or config.num_layers
    with torch.device("cuda"):
        return Llama(config, 0, torch.bfloat16, KernelBackends(attention, "torch", "fast"))


def inputs(tokens: int, segments: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ids, positions, borders, targets and denominator."""
    with torch.device("cuda"):
        places = (torch.zeros(tokens, dtype=torch.int64) for _ in range(3))
        ids, positions, targets = places
        borders = torch.zeros(segments + 1, dtype=torch.int32)
        return ids, positions, borders, targets, torch.ones((), dtype=torch.int64)


def step(model: Any, tokens: int, segments: int, longest: int, backward: bool = True) -> None:
    ids, positions, borders, targets, denominator = inputs(tokens, segments)
    loss = model(ids, positions, borders, longest, targets, denominator=denominator)
    if backward:
        loss.backward()


def compiled(name: str, tokens: int, context: int, attention: str, mode: str, way: str) -> Any:
    """Graphs over 50 packs of random borders, of one layer that all share."""
    torch._dynamo.reset()
    counters.clear()
    graphs, generator = Graphs(), np.random.default_rng(0)
    ranks = 4 if way == "cp" else 1
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build(name, attention, 2)
        if way == "cp":
            assert dist.group.WORLD is not None
            apply_context_parallel(model, dist.group.WORLD)
        recompute_blocks(model, ActivationCheckpointing(mode))
        for layer in model.model.layers:
            layer.compile(backend=graphs.backend)
        if way == "fsdp":
            with unset_fake_temporarily():  # a mesh holds the numbers of its ranks
                mesh = init_device_mesh("cuda", (4,))
            setattr(ranks_module, "init_device_mesh", lambda *a, **k: mesh)  # noqa: B010
            place = Ranks(1, 4, torch.device("cuda", 0))
            parallelize(model, place, RuntimeConfig(parallel=Parallel.fsdp))
        windows = tokens // context
        for pack in range(PACKS):
            if attention == "cudnn":  # one segment a window
                segments, longest = windows, context
            else:
                segments = windows << int(generator.integers(6))
                longest = context >> int(generator.integers(4))
            # What is compiled is decided in the forward pass; a graph's first brings its backward.
            step(model, tokens // ranks, segments, longest, backward=pack < 5)
    return {
        "graphs": len(graphs.forward),
        "breaks": sum(counters["graph_break"].values()),
        "forward": sorted({call for graph in graphs.forward for call in graph}),
        "backward": sorted({call for graph in graphs.backward for call in graph}),
    }


def eager(
    name: str, tokens: int, context: int, attention: str, mode: str, layers: int | None
) -> Any:
    """Peak bytes of a step with AdamW, and the estimate."""
    chosen = ActivationCheckpointing(mode)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build(name, attention, layers)
        recompute_blocks(model, chosen)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            for _ in range(2):  # the second has the moments
                tracker.reset_mod_stats()
                step(model, tokens, tokens // context, context)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    peak = tracker.get_tracker_snapshot("peak")
    [found] = [snapshot for device, snapshot in peak.items() if device.type == "cuda"]
    total = next(size for kind, size in found.items() if "Total" in str(kind))
    runtime = RuntimeConfig(compile=False, attention_backend=AttentionBackend(attention))
    config = TrainConfig(
        data=DataConfig(context_length=context), model=model.config, runtime=runtime
    )
    return {"peak": total, "estimate": step_bytes(config, tokens, 1, chosen)}


def main() -> None:
    if any(case.endswith((",cp", ",fsdp")) for case in sys.argv[1:]):
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    for case in sys.argv[1:]:
        name, tokens, context, attention, mode, way, *layers = case.split(",")
        began = time.perf_counter()
        sizes = int(tokens), int(context)
        if way == "eager":
            depth = int(layers[0]) if layers else None
            found = eager(name, *sizes, attention, mode, depth)
        else:
            found = compiled(name, *sizes, attention, mode, way)
        seconds = round(time.perf_counter() - began, 1)
        print(json.dumps({"case": case, **found, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
