"""Peak memory of the backward pass of packed attention at growing numbers of segments.

    python -m benchmarks.varlen_memory

The same 65,536 tokens (300M heads, 12 of size 64) in 16 windows of 4,096, their borders padded to
176, 4,400 and 70,400 segments: as many as are used, as many as the corpus's shortest documents
would make of every window, and sixteen times as many. The bound of their length stays 4,096.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from kernels.attention.interface import refusal
from kernels.check.attention import Heads, Pack, bind

GPU = {"tokens": 65_536, "longest": 4096, "segments": [11, 275, 4400], "heads": Heads(12, 12, 64)}
CPU = {"tokens": 256, "longest": 64, "segments": [4, 8], "heads": Heads(2, 2, 16)}


def padded(tokens: int, longest: int, segments: int) -> Pack:
    """Full windows of ``longest`` tokens, and empty segments up to ``segments`` a window."""
    windows = tokens // longest
    borders = torch.arange(windows + 1, dtype=torch.int32) * longest
    empty = borders[-1:].expand(max(0, windows * (segments - 1)))
    return Pack(torch.cat((borders, empty)), longest, tokens)


def measure(backend: str, heads: Heads, pack: Pack, place: torch.device) -> dict[str, Any]:
    """Bytes above inputs, outputs and gradients, or why there are none."""
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    shape = pack.tokens, heads.query, heads.size
    q, k, v, dout = (torch.randn(shape, device=place, dtype=dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    row: dict[str, Any] = {"backend": backend, "segments": len(pack.cu_seqlens) - 1}
    try:
        if why := refusal(backend, place, heads.size):
            raise ValueError(why)
        out, _ = bind(backend, heads, pack.to(place))(*leaves)

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, leaves, dout, retain_graph=True)

        row["peak_bytes"] = timing.peak_bytes(backward)
        row["seconds"] = timing.interleaved({backend: backward}, 3)[0][backend]["median"]
    except Exception as error:  # out of memory is an answer here
        row["failed"] = timing.reason(error)
    return row


def main(arguments: list[str] | None = None) -> None:
    assert __doc__ is not None
    options = timing.arguments(__doc__.partition("\n")[0], "varlen-memory").parse_args(arguments)
    place = timing.device()
    shape: dict[str, Any] = GPU if place.type == "cuda" else CPU
    backends = ("flash", "cudnn", "triton") if place.type == "cuda" else ("torch",)
    rows = []
    for segments in shape["segments"]:
        pack = padded(shape["tokens"], shape["longest"], segments)
        for backend in backends:
            row = measure(backend, shape["heads"], pack, place)
            rows.append(row)
            print(row, flush=True)
            if place.type == "cuda":
                torch.cuda.empty_cache()
    timing.write_results(options.output, "python -m benchmarks.varlen_memory", rows)


if __name__ == "__main__":
    main()
