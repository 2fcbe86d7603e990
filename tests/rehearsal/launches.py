"""The host's side of every launch with a fake Triton driver: how often would a kernel compile?

``python -m tests.rehearsal.launches`` launches attention and loss on CPU tensors of many sizes.
Triton specialises the arguments in earnest, for sm_90; compiling is noted instead of done. Prints
the number of variants of each kernel as one JSON line.
"""

from __future__ import annotations

import json
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

VARIANTS: defaultdict[str, set[str]] = defaultdict(set)


class Driver:
    """What a launch asks a driver for."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {
            "max_shared_mem": 232_448,
            "multiprocessor_count": 132,
            "max_num_regs": 65_536,
            "warpSize": 32,
        }
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def note(self: Any, key: str, *arguments: Any, **options: Any) -> None:
    module = self.fn.__module__.removeprefix("kernels.")
    VARIANTS[f"{module}.{self.fn.__name__}"].add(key)


def launch_attention(tokens: int, segments: int, heads: tuple[int, int, int], gluon: bool) -> None:
    """Forward, dQ, and dK with dV, as one layer launches them."""
    from kernels.attention.saved import Saved
    from kernels.attention.sm90 import backward, forward
    from kernels.attention.tile_config import TileConfig
    from kernels.attention.tile_scheduler import make_tiles
    from kernels.attention.triton import dkdv as triton_dkdv
    from kernels.attention.triton import dq as triton_dq
    from kernels.attention.triton import forward as triton_forward

    query, key, size = heads
    joined = torch.zeros(tokens, query + 2 * key, size, dtype=torch.bfloat16)
    q, k, v = joined.split([query, key, key], 1)
    borders = torch.linspace(0, tokens, segments + 1).to(torch.int32)
    config = TileConfig(128, 128, *[64, 8, 2] * 3)
    rows, columns, _ = make_tiles(borders, borders, tokens, tokens, config)
    dout = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.zeros(query, tokens)
    saved = Saved(q, k, v, dout, lse, dout, lse)
    if gluon:
        forward.attention_forward_sm90(q, k, v, rows, 0.125, 132)
        for one_pass in (False, True):
            backward.attention_backward_sm90(saved, rows, columns, 0.125, 132, one_pass)
        return
    options: Any = (config, 0.125, None, 0.0)
    triton_forward.attention_forward(q, k, v, rows, *options)
    triton_dq.query_gradient(saved, rows, *options)
    triton_dkdv.key_gradients(saved, lse, columns, *options)


def launch_loss(rows: int, vocabulary: int, chunk: int) -> None:
    """The anchored kernels and those with every option."""
    from kernels.cross_entropy.chunked import Options
    from kernels.cross_entropy.triton.anchored import anchored_cross_entropy
    from kernels.cross_entropy.triton.forward_only import forward_only
    from kernels.cross_entropy.triton.steps import gradient, statistics

    hidden = torch.zeros(rows, 64, dtype=torch.bfloat16)
    weight = torch.zeros(vocabulary, 64, dtype=torch.bfloat16)
    targets, weights = torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
    anchored_cross_entropy(hidden, weight, targets, weights, 0.0, chunk, None, None)
    forward_only(hidden, weight, None, targets, 0.0)
    logits = torch.zeros(min(rows, chunk), vocabulary, dtype=torch.bfloat16)
    vectors = (targets[: len(logits)], weights[: len(logits)])
    statistics(logits, None, vectors[0], Options())
    gradient(logits, None, vectors[0], vectors[1], vectors[1], Options(), vocabulary, None)


def main() -> None:
    driver.set_active(Driver())
    JITFunction._do_compile = note
    for heads in ((12, 12, 64), (16, 16, 96), (16, 8, 128)):
        for tokens, segments in ((4096, 3), (4096, 16), (4095, 7), (2000, 9), (65, 1)):
            for gluon in (False, True):
                launch_attention(tokens, segments, heads, gluon)
    for rows in (512, 500, 333):
        launch_loss(rows, 2048, 128)
    print(json.dumps({name: len(keys) for name, keys in VARIANTS.items()}))


if __name__ == "__main__":
    main()
