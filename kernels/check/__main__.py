"""``python -m kernels.check``: see the package."""

from __future__ import annotations

import argparse
import sys
import time

import torch

from ..segments import padded_borders
from . import __doc__ as description
from .attention import Heads, Pack, attention_backends, attention_verdicts, awkward_pack
from .loss import loss_backends, loss_verdicts
from .verdicts import choose


def main(arguments: list[str] | None = None) -> int:
    """Check everything that could run here; 1 if something that could run is wrong."""
    assert description is not None
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--heads", default="12/12x64", help="query heads / key heads x size")
    parser.add_argument("--tokens", type=int, default=65_536, help="of the timing, on a GPU")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=128_256)
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
    for what, verdicts in (("attention", attention), ("loss", loss)):
        for verdict in verdicts:
            speed = "" if verdict.seconds is None else f"{verdict.seconds * 1e3:10.3f} ms"
            print(f"{what:10} {verdict.backend:11} {verdict.failed or 'right':60} {speed}")
        try:
            print(choose(what, verdicts).line)
        except ValueError as error:
            print(f"error: {error}")
    print(f"{time.perf_counter() - began:.1f} s")
    return int(any(v.failed for v in attention[: len(backends)] + loss))


if __name__ == "__main__":
    sys.exit(main())
