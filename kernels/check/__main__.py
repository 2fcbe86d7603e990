"""``python -m kernels.check``: see the package."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from ..segments import padded_borders
from . import __doc__ as description
from .attention import Heads, Pack, attention_backends, attention_verdicts, awkward_pack
from .loss import loss_backends, loss_verdicts
from .verdicts import choose, circumstances


def main(arguments: list[str] | None = None) -> int:
    """Check everything that could run here; 1 if something that could run is wrong."""
    assert description is not None
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--heads", default="12/12x64", help="query heads / key heads x size")
    parser.add_argument("--tokens", type=int, default=65_536, help="of the timing, on a GPU")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--output", type=Path, help="JSON of the verdicts")
    options = parser.parse_args(arguments)
    sizes = options.heads.replace("x", "/").split("/")
    heads = Heads(*(int(size) for size in sizes))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if not on_gpu:
        print("No CUDA device: what runs on a CPU is checked, at small sizes.")
        options.tokens = min(options.tokens, 1024)
        options.width, options.vocabulary = min(options.width, 64), min(options.vocabulary, 500)
    began = time.perf_counter()
    segments = [*range(0, options.tokens, 1024), options.tokens]
    timed = Pack(*padded_borders(segments, options.tokens), options.tokens)
    backends, refused = attention_backends(heads, device, dtype)
    attention = attention_verdicts(backends, heads, dtype, device, awkward_pack(), timed) + refused
    loss = loss_verdicts(
        loss_backends(device), options.width, options.vocabulary, dtype, device, options.tokens
    )
    found: dict[str, Any] = {}
    for what, verdicts in (("attention", attention), ("loss", loss)):
        lines = [
            (what, one.backend, one.failed or "right", one.seconds and one.seconds * 1e3)
            for one in verdicts
        ]
        print(tabulate(lines, ["", "backend", "verdict", "ms"], "plain", floatfmt=".3f"))
        try:
            line = choose(what, verdicts).line
        except ValueError as error:
            line = f"error: {error}"
        print(line)
        found[what] = {"line": line, "verdicts": [verdict._asdict() for verdict in verdicts]}
    seconds = time.perf_counter() - began
    print(f"{seconds:.1f} s")
    if options.output:
        found |= {"seconds": seconds, "shape": vars(options) | {"output": None}}
        content = {**circumstances(device), "results": found}
        options.output.write_text(json.dumps(content, indent=1) + "\n")
    return int(any(v.failed for v in attention[: len(backends)] + loss))


if __name__ == "__main__":
    sys.exit(main())
