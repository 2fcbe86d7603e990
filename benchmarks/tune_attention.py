"""Find the fastest tiles of the Triton attention on this GPU and write them to the kernels' file.

    python -m benchmarks.tune_attention                      # head dimensions 64, 96, 128
    python -m benchmarks.tune_attention --head-dims 128 --groups 1 4

Each kernel is timed by itself, on a pack of short documents for batches without longer ones and on
one long document for the others. Combinations that do not compile or do not fit are left out. Takes
long: hundreds of compilations.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.attention import lognormal
from kernels.attention.saved import Saved
from kernels.attention.tile_config import FILE, TileConfig, read_configs
from kernels.attention.tile_scheduler import make_tiles
from trainer.data.random_stream import random_windows
from trainer.files import write_json

# By the smallest max_seqlen that the tiles are for.
PACKS = {1: lognormal(32_768), 8192: [32_768]}
HEADS = 16
TILES = (64, 128)
STEPS = (32, 64, 128)
WARPS = (4, 8)
STAGES = (1, 2, 3)
BLANK = TileConfig(128, 128, *[64, 8, 2] * 3)


class TimedKernels:
    """The three kernels on a pack of one head shape."""

    def __init__(self, head_dim: int, group: int, lengths: list[int]) -> None:
        self.borders = random_windows([lengths], sum(lengths)).cu_seqlens.cuda()
        generator = torch.Generator("cuda").manual_seed(0)
        options: dict[str, Any] = {"device": "cuda", "generator": generator}
        self.scale = head_dim**-0.5
        tokens = sum(lengths)
        q, k, v, dout = (
            torch.randn(tokens, heads, head_dim, **options).bfloat16()
            for heads in (HEADS, HEADS // group, HEADS // group, HEADS)
        )
        lse, self.delta, dlse = torch.zeros(3, HEADS, tokens, device="cuda")
        self.saved = Saved(q, k, v, torch.randn_like(q), lse + 20, dout, dlse)

    def candidate(self, kernel: str, config: TileConfig) -> timing.Candidate:
        """One launch of one kernel; its tables are made here."""
        from kernels.attention.triton.dkdv import key_gradients
        from kernels.attention.triton.dq import query_gradient
        from kernels.attention.triton.forward import attention_forward

        q, k, v = self.saved[:3]
        tokens = len(q)
        tiles = make_tiles(self.borders, self.borders, tokens, tokens, config)
        options = (config, self.scale, None, 0.0)
        calls: dict[str, timing.Candidate] = {
            "forward": lambda: attention_forward(q, k, v, tiles.q_tiles, *options),
            "dq": lambda: query_gradient(self.saved, tiles.q_tiles, *options),
            "dkdv": lambda: key_gradients(self.saved, self.delta, tiles.kv_tiles, *options),
        }
        return calls[kernel]

    def score(self, kernel: str, configs: list[TileConfig], rounds: int) -> dict[TileConfig, float]:
        """Median seconds of the configurations that run."""
        candidates = {
            str(index): self.candidate(kernel, config) for index, config in enumerate(configs)
        }
        times, _ = timing.interleaved(candidates, rounds)
        return {configs[int(name)]: seconds["median"] for name, seconds in times.items()}


def variants(kernel: str, tile: int) -> Iterator[TileConfig]:
    """Every combination of step, warps and stages of one kernel with one tile size."""
    table = "kv_tile" if kernel == "dkdv" else "q_tile"
    for step, warps, stages in itertools.product(STEPS, WARPS, STAGES):
        yield BLANK._replace(
            **{
                table: tile,
                f"{kernel}_step": step,
                f"{kernel}_warps": warps,
                f"{kernel}_stages": stages,
            }
        )


def best(kernels: TimedKernels, rounds: int) -> TileConfig:
    """Query tiles are shared by forward and dQ, so their sum decides; dK/dV stands alone."""
    by_q_tile: list[tuple[float, TileConfig]] = []
    for tile in TILES:
        chosen, total = BLANK._replace(q_tile=tile), 0.0
        for kernel in ("forward", "dq"):
            scores = kernels.score(kernel, list(variants(kernel, tile)), rounds)
            if not scores:
                break
            fastest = min(scores, key=scores.__getitem__)
            total += scores[fastest]
            chosen = copy_kernel(chosen, fastest, kernel)
            print(f"  {kernel} query tile {tile}: {scores[fastest] * 1e3:.3f} ms", flush=True)
        else:
            by_q_tile.append((total, chosen))
    dkdv = [config for tile in TILES for config in variants("dkdv", tile)]
    scores = kernels.score("dkdv", dkdv, rounds)
    if not by_q_tile or not scores:
        raise RuntimeError("no combination of tiles runs on this GPU; nothing is written")
    fastest = min(scores, key=scores.__getitem__)
    print(f"  dkdv key tile {fastest.kv_tile}: {scores[fastest] * 1e3:.3f} ms", flush=True)
    return copy_kernel(min(by_q_tile)[1], fastest, "dkdv")._replace(kv_tile=fastest.kv_tile)


def copy_kernel(target: TileConfig, source: TileConfig, kernel: str) -> TileConfig:
    """``target`` with one kernel's step, warps and stages of ``source``."""
    fields = (f"{kernel}_{name}" for name in ("step", "warps", "stages"))
    return target._replace(**{field: getattr(source, field) for field in fields})


def main(arguments: list[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--head-dims", nargs="*", type=int, default=[64, 96, 128])
    parser.add_argument("--groups", nargs="*", type=int, default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, help="also write what was found here")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device; tiles can only be tuned on the GPU they are for")
    architecture = f"sm_{torch.cuda.get_device_capability()[0]}0"
    configs = read_configs()
    found: list[dict[str, int]] = []
    shapes = itertools.product(options.head_dims, options.groups, PACKS)
    for head_dim, group, longest in shapes:
        print(
            f"{architecture}, head dimension {head_dim}, {group} query heads a key head, "
            f"documents from {longest} tokens"
        )
        chosen = best(TimedKernels(head_dim, group, PACKS[longest]), options.rounds)
        found.append({"head_dim": head_dim, "group": group, "longest": longest} | chosen._asdict())
        entry = configs.setdefault(architecture, {}).setdefault(str(head_dim), {})
        entry.setdefault(str(group), {})[str(longest)] = chosen._asdict()
        # After every shape, so that an interrupted run keeps what it has found.
        write_json(FILE, configs)
    if options.output:
        timing.write_results(options.output, "python -m benchmarks.tune_attention", found)
    print(f"written: {FILE}; run the tests of tests/kernels on this GPU before using it")


if __name__ == "__main__":
    main()
