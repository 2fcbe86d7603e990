"""Time and memory of the fused linear cross-entropy against its peers and its floor.

    python -m benchmarks.cross_entropy                     # all shapes, whatever is installed
    python -m benchmarks.cross_entropy --shapes 65536x1024x131072 --providers ours liger

One measurement is the loss and both gradients, in bf16 on a GPU and fp32 on a CPU. The floor F is
the three bare matrix products of the same shape in the same loop. Peers: Liger-Kernel
(``liger-kernel``), Apple's cut cross-entropy (``cut-cross-entropy``), PyTorch's own fused function
where it exists, and the plain loss, compiled.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import timing
from kernels import linear_cross_entropy, token_losses

# tokens, width, vocabulary: the ladder, then the paper's 300M and 1.5B models
GPU_SHAPES = [
    (65_536, 1024, 131_072),
    (131_072, 1024, 131_072),
    (65_536, 1024, 32_768),
    (8_192, 4096, 128_256),
    (65_536, 4096, 131_072),
    (16_384, 2048, 248_320),
    (65_536, 768, 128_256),
    (65_536, 1536, 128_256),
]
CPU_SHAPES = [(1024, 256, 8192), (512, 768, 16_384)]
# Rows of a chunk of the floor's products: whole logits would not fit.
FLOOR_ROWS = 8192


def floor(hidden: Tensor, weight: Tensor) -> None:
    """The three matrix products of the fast mode and nothing else."""
    for start in range(0, len(hidden), FLOOR_ROWS):
        x = hidden[start : start + FLOOR_ROWS]
        logits = x @ weight.T
        logits @ weight
        logits.T @ x


def anchored(hidden: Tensor, weight: Tensor, targets: Tensor, fused: bool) -> None:
    """The anchored kernels themselves, by cuBLAS and a pass or with the exponential fused."""
    from kernels.cross_entropy.triton.anchored import anchored_cross_entropy

    row_weight = torch.full((len(hidden),), 1 / len(hidden), device=hidden.device)
    gradients = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
    anchored_cross_entropy(hidden, weight, targets, row_weight, 0.0, 8192, *gradients, fused)


def providers(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, timing.Candidate]:
    """Every implementation that can run here, by name."""
    leaves = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())

    def step(loss: Any, *extra: Any, **options: Any) -> timing.Candidate:
        return lambda: torch.autograd.grad(loss(*leaves, *extra, **options), leaves)

    def ours(backend: str, memory: str) -> timing.Candidate:
        return step(linear_cross_entropy, targets, backend=backend, memory=memory)

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy((x @ w.T).float(), targets)

    found: dict[str, timing.Candidate] = {
        "floor": lambda: floor(hidden, weight),
        "ours torch fast": ours("torch", "fast"),
        "ours torch lean": ours("torch", "lean"),
        "evaluation torch": lambda: token_losses(hidden, weight, targets),
        "plain": step(plain),
    }
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["pytorch"] = step(F.linear_cross_entropy, targets, options=options)
    if not hidden.is_cuda:
        return found
    found |= {
        "ours triton fast": ours("triton", "fast"),
        "ours triton lean": ours("triton", "lean"),
        "anchored": lambda: anchored(hidden, weight, targets, False),
        "anchored fused": lambda: anchored(hidden, weight, targets, True),
        "evaluation triton": lambda: token_losses(hidden, weight, targets, backend="triton"),
        "plain compiled": step(torch.compile(plain, dynamic=False)),
    }
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

        found["liger"] = step(liger, targets)
        found["liger const=16"] = step(liger, targets, chunk_mem_const=16)
        found["liger fp32 dW"] = step(liger, targets, accum_dtype=torch.float32)
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cut

        found["cce filtered"] = step(cut, targets)
        found["cce unfiltered"] = step(cut, targets, filter_eps=None)
    return found


def measure(
    shape: tuple[int, int, int], names: list[str], rounds: int, place: torch.device
) -> list[dict[str, Any]]:
    """One row a provider: seconds, their ratio to the floor, bytes at the peak."""
    torch._dynamo.reset()  # its limit of compilations holds for all shapes together
    tokens, width, vocabulary = shape
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    generator = torch.Generator(place).manual_seed(0)
    hidden = torch.randn(tokens, width, device=place, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, device=place, generator=generator)
    weight = (weight / width**0.5).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), device=place, generator=generator)
    chosen = {
        name: call
        for name, call in providers(hidden, weight, targets).items()
        if name == "floor" or not names or any(name.startswith(wanted) for wanted in names)
    }
    times, failed = timing.interleaved(chosen, rounds)
    rows = []
    for name, seconds in times.items():
        flops = (2 if name.startswith("evaluation") else 6) * tokens * width * vocabulary
        rows.append(
            {
                "shape": [*shape],
                "provider": name,
                "seconds": seconds,
                "ratio_to_floor": seconds["median"] / times["floor"]["median"],
                "tflops": flops / seconds["median"] / 1e12,
                "peak_bytes": timing.peak_bytes(chosen[name]),
            }
        )
    rows += [{"shape": [*shape], "provider": name, "failed": why} for name, why in failed.items()]
    return rows


def show(rows: list[timing.Row]) -> None:
    """One table a shape."""
    timing.print_table(
        f"tokens x width x vocabulary = {' x '.join(map(str, rows[0]['shape']))}",
        rows,
        ("provider",),
        lambda row: {
            "ms": row["seconds"]["median"] * 1e3,
            "x floor": row["ratio_to_floor"],
            "TFLOP/s": row["tflops"],
            "peak MiB": None if row["peak_bytes"] is None else row["peak_bytes"] / 2**20,
        },
        ".2f",
    )


def shape_of(row: dict[str, Any]) -> str:
    return "x".join(map(str, row["shape"]))


def scaled(row: timing.Row, key: str, unit: float) -> float:
    return float(row[key] / unit)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time over the floor and peak memory, a group of bars for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    done = [row for row in rows if row["provider"] != "floor"]
    with_memory = any(row.get("peak_bytes") for row in done)
    figure, axes = plt.subplots(
        1 + with_memory, 1, figsize=(10, 4 + 4 * with_memory), squeeze=False
    )
    panels = [("ratio_to_floor", "time / three matrix products", 1.0)]
    if with_memory:
        panels.append(("peak_bytes", "peak memory in GiB", 2.0**30))
    for axis, (key, label, unit) in zip(axes[:, 0], panels, strict=True):
        height = partial(scaled, key=key, unit=unit)
        timing.grouped_bars(axis, timing.bars_of(done, "provider", shape_of, height))
        axis.set_ylabel(label)
    axes[0, 0].axhline(1, color="black", linewidth=0.8)
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    assert __doc__ is not None
    parser = timing.arguments(__doc__.partition("\n")[0], "cross-entropy")
    parser.add_argument(
        "--shapes", nargs="*", help="tokens x width x vocabulary, as 8192x1024x32768"
    )
    parser.add_argument("--providers", nargs="*", default=[], help="beginnings of providers' names")
    options = parser.parse_args(arguments)
    place = timing.device()
    shapes = GPU_SHAPES if place.type == "cuda" else CPU_SHAPES
    if options.shapes:
        shapes = [(int(n), int(d), int(v)) for n, d, v in (x.split("x") for x in options.shapes)]
    rows = []
    for shape in shapes:
        rows += measure(shape, options.providers, options.rounds, place)
        show([row for row in rows if row["shape"] == [*shape]])
    timing.write_results(options.output, "python -m benchmarks.cross_entropy", rows)
    plot(rows, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
