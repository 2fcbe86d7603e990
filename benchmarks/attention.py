"""Time of document-masked attention against its peers and its floors.

    python -m benchmarks.attention                       # all packs and shapes, whatever is there
    python -m benchmarks.attention --packs one lognormal --heads 16/8x128 --passes forward

TFLOP/s count unmasked pairs only: 4 FLOPs a pair, head and dimension forward, 10 backward. The
floors are those FLOPs at the rate of a square bf16 matrix product, and the bytes that inputs,
outputs and gradients take at the rate of a copy, both measured in the same run. Peers are called
without anything around them: PyTorch's varlen_attn (by FlashAttention and by cuDNN), FlexAttention
with its block mask made beforehand, the flash-attn package, FA-3 (fa3-fwd), FA-4 (flash-attn-4)
and, for one document, cuDNN by SDPA.
"""

from __future__ import annotations

import importlib.util
import math
import operator
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import timing
from kernels import attention_tiles, varlen_attention
from kernels.attention.flex import document_block_mask, fused_flex_attention
from kernels.attention.libraries import HAS_CUDNN, HAS_GQA, LIBRARIES
from kernels.attention.tile_config import TileConfig, tile_config
from trainer.data.random_stream import random_windows

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Heads = tuple[int, int, int]  # query heads, key heads, head dimension
GPU_HEADS: list[Heads] = [(12, 12, 64), (16, 8, 96), (16, 8, 128), (32, 8, 128)]
CPU_HEADS: list[Heads] = [(4, 2, 64)]
PASSES = ("forward", "backward", "both")
FLOPS = {"forward": 4, "backward": 10, "both": 14}  # a pair, head and dimension


def gpu_packs() -> dict[str, list[int]]:
    """Segment lengths by name; 65,536 tokens unless the name says more."""
    return {
        "one": [65_536],
        "53 equal": fill(65_536, [1_237] * 53),
        "lognormal": lognormal(65_536),
        "megadocs": fill(65_536, [22_600] * 3),
        "30k first": fill(65_536, [30_000] + [1_000] * 36),
        "30k middle": fill(65_536, [1_000] * 18 + [30_000] + [1_000] * 18),
        "30k last": [*fill(35_536, [1_000] * 36), 30_000],
        "131k in 262k": fill(262_144, [131_072] + [1_000] * 132),
        **{f"small {n // 1024}k": lognormal(n) for n in (2_048, 4_096, 8_192, 16_384)},
    }


def cpu_packs() -> dict[str, list[int]]:
    return {"one": [1_024], "8 equal": [128] * 8, "lognormal": lognormal(1_024)}


def fill(tokens: int, lengths: list[int]) -> list[int]:
    """The lengths in their order, the last one cut so that they sum to ``tokens``."""
    kept, rest = [], tokens
    for length in lengths:
        kept.append(min(length, rest))
        rest -= kept[-1]
    return [length for length in kept if length] + ([rest] if rest else [])


def lognormal(tokens: int) -> list[int]:
    """Median 700, sigma 1.4, none longer than a quarter of the pack."""
    drawn = torch.empty(tokens).log_normal_(
        math.log(700), 1.4, generator=torch.Generator().manual_seed(0)
    )
    return fill(tokens, drawn.clamp(1, tokens // 4).long().tolist())


def pairs(lengths: list[int]) -> int:
    """Unmasked (query, key) pairs."""
    return sum(length * (length + 1) // 2 for length in lengths)


def tile_efficiency(lengths: list[int], config: TileConfig) -> dict[str, float]:
    """Unmasked pairs over those that the forward and the dK/dV tiles compute."""
    forward = backward = 0
    for length in lengths:
        for begin in range(0, length, config.q_tile):
            end = min(begin + config.q_tile, length)
            forward += config.q_tile * math.ceil(end / config.forward_step) * config.forward_step
        for begin in range(0, length, config.kv_tile):
            steps = math.ceil((length - begin) / config.dkdv_step)
            backward += config.kv_tile * steps * config.dkdv_step
    return {"forward": pairs(lengths) / forward, "dkdv": pairs(lengths) / backward}


def least_bytes(tokens: int, heads: Heads, which: str) -> int:
    """Bytes of half-precision inputs, outputs and gradients and the fp32 log-sum-exp, each once."""
    q_heads, key_heads, size = heads
    forward = 2 * tokens * size * (2 * q_heads + 2 * key_heads) + 4 * tokens * q_heads
    backward = 2 * tokens * size * (4 * q_heads + 4 * key_heads) + 4 * tokens * q_heads
    return {"forward": forward, "backward": backward, "both": forward + backward}[which]


def providers(
    q: Tensor, k: Tensor, borders: Tensor, longest: int
) -> dict[str, Callable[[], Attend]]:
    """How to make every implementation that can run here, with its tables and masks, by name."""
    if not q.is_cuda:
        return {name: partial(ours, borders, longest, name) for name in ("torch", "reference")}
    tokens, group, size = q.shape[0], q.shape[1] // k.shape[1], q.shape[2]
    tables = partial(attention_tiles, borders, tokens, size, group, max_seqlen=longest)
    found: dict[str, Callable[[], Attend]] = {
        "triton": lambda: ours(borders, longest, "triton", tiles=tables()),
        "triton+tables": lambda: ours(borders, longest, "triton"),  # made in every call
        "gluon": lambda: ours(borders, longest, "gluon", tiles=tables(gluon=True)),
        "gluon_split": lambda: ours(borders, longest, "gluon_split", tiles=tables(gluon=True)),
        "flash": lambda: pytorch("flash", borders, longest, group),
        "flex": lambda: flex(borders, tokens),
    }
    if HAS_CUDNN:
        found["cudnn"] = lambda: pytorch("cudnn", borders, longest, group)
    if len(borders) == 2:
        found["cudnn sdpa"] = lambda: cudnn
    for name, module in (
        ("flash_attn", "flash_attn.flash_attn_interface"),
        ("fa3", "flash_attn_interface"),
        ("fa4", "flash_attn.cute"),
    ):
        if present(module):
            found[name] = partial(flash, module, borders, longest)
    return found


def ours(borders: Tensor, longest: int, backend: str, **options: Any) -> Attend:
    """A backend of our own function."""
    return partial(
        varlen_attention, cu_seqlens=borders, max_seqlen=longest, backend=backend, **options
    )


def present(module: str) -> bool:
    """Whether a module can be found, its parents included."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def pytorch(library: str, borders: Tensor, longest: int, group: int) -> Attend:
    from torch.nn.attention import sdpa_kernel
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1, 0)}
    if HAS_GQA:
        options["enable_gqa"] = group > 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(LIBRARIES[library]):
            out = varlen_attn(q, k, v, borders, borders, longest, longest, **options)
        assert isinstance(out, Tensor)  # without return_aux
        return out

    return attend


def flex(borders: Tensor, tokens: int) -> Attend:
    mask = document_block_mask(borders, tokens)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out: Tensor = fused_flex_attention(True)(q, k, v, block_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    return attend


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0]


def flash(module: str, borders: Tensor, longest: int) -> Attend:
    """``flash_attn_varlen_func`` of one of the flash-attn generations."""
    function = importlib.import_module(module).flash_attn_varlen_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor | tuple[Tensor, ...] = function(
            q,
            k,
            v,
            cu_seqlens_q=borders,
            cu_seqlens_k=borders,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=True,
        )
        return out[0] if isinstance(out, tuple) else out

    return attend


def candidate(
    attend: Attend, leaves: tuple[Tensor, ...], dout: Tensor, which: str
) -> timing.Candidate:
    """One pass of one provider; the backward pass's graph is made in its first call."""
    q, k, v = leaves
    graph: list[Tensor] = []

    def gradients(out: Tensor, keep: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, dout, retain_graph=keep)

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(q, k, v)

    def backward() -> tuple[Tensor, ...]:
        if not graph:
            graph.append(attend(q, k, v))
        return gradients(graph[0], True)

    def both() -> tuple[Tensor, ...]:
        return gradients(attend(q, k, v), False)

    return {"forward": forward, "backward": backward, "both": both}[which]


def floors(place: torch.device, rounds: int) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s of a large copy."""
    on_gpu = place.type == "cuda"
    side = 8192 if on_gpu else 512
    a, b = torch.randn(2, side, side, device=place, dtype=torch.bfloat16 if on_gpu else None)
    source = torch.zeros((1 << 30) if on_gpu else (1 << 25), dtype=torch.uint8, device=place)
    target = torch.empty_like(source)
    candidates = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    times, _ = timing.interleaved(candidates, rounds)
    return 2 * side**3 / times["matmul"]["median"], 2 * len(source) / times["copy"]["median"]


def measure(
    pack: str,
    lengths: list[int],
    heads: Heads,
    passes: list[str],
    rates: tuple[float, float],
    options: Any,
    place: torch.device,
) -> list[dict[str, Any]]:
    """One row a pass and provider."""
    q_heads, key_heads, size = heads
    tokens = sum(lengths)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    generator = torch.Generator(place).manual_seed(0)
    q, k, v = (
        torch.randn(tokens, n, size, device=place, generator=generator).to(dtype).requires_grad_()
        for n in (q_heads, key_heads, key_heads)
    )
    dout = torch.randn(q.shape, device=place, generator=generator).to(dtype)
    batch = random_windows([lengths], tokens)  # the borders that training would hand over
    borders = batch.cu_seqlens.to(place)
    torch._dynamo.reset()  # its limit of compilations holds for all shapes together
    chosen: dict[str, Attend] = {}
    unmade: dict[str, str] = {}
    for name, make in providers(q, k, borders, batch.max_seqlen).items():
        if options.providers and name not in options.providers:
            continue
        try:
            chosen[name] = make()
        except Exception as error:  # a mask too large, a package that is installed in part
            unmade[name] = timing.reason(error)
    shared: dict[str, Any] = {"pack": pack, "tokens": tokens}
    shared["heads"] = f"{q_heads}/{key_heads}x{size}"
    if place.type == "cuda":
        config = tile_config(place, size, q_heads // key_heads, batch.max_seqlen)
        shared["tile_efficiency"] = tile_efficiency(lengths, config)
    rows = []
    for which in passes:
        candidates = {name: candidate(f, (q, k, v), dout, which) for name, f in chosen.items()}
        times, failed = timing.interleaved(candidates, options.rounds)
        flops = FLOPS[which] * pairs(lengths) * q_heads * size
        flop_floor = flops / rates[0]
        memory_floor = least_bytes(tokens, heads, which) / rates[1]
        for name, seconds in times.items():
            median = seconds["median"]
            rows.append(
                {
                    **shared,
                    "pass": which,
                    "provider": name,
                    "seconds": seconds,
                    "tflops": flops / median / 1e12,
                    "ratio_to_flop_floor": median / flop_floor,
                    "ratio_to_memory_floor": median / memory_floor,
                    "speed_over": {
                        peer: other["median"] / median
                        for peer, other in times.items()
                        if peer != name
                    },
                }
            )
        rows += [
            {**shared, "pass": which, "provider": name, "failed": why}
            for name, why in (unmade | failed).items()
        ]
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """One table a pack and head shape."""
    first = rows[0]
    title = f"{first['pack']}: {first['tokens']:,} tokens, heads {first['heads']}"
    if "tile_efficiency" in first:
        shares = first["tile_efficiency"]
        title += f"\ntile efficiency: forward {shares['forward']:.3f}, dK/dV {shares['dkdv']:.3f}"
    timing.print_table(
        title,
        rows,
        ("pass", "provider"),
        lambda row: {
            "ms": row["seconds"]["median"] * 1e3,
            "TFLOP/s": row["tflops"],
            "x FLOPs": row["ratio_to_flop_floor"],
            "x bytes": row["ratio_to_memory_floor"],
            "speed over peers": ", ".join(
                f"{peer} {ratio:.2f}" for peer, ratio in row["speed_over"].items()
            ),
        },
        ("", "", ".3f", ".2f", ".2f", ".2f"),
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """TFLOP/s on unmasked pairs: a row of panels a pass, a panel a head shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    done = [row for row in rows if "failed" not in row]
    shapes, passes = (list(dict.fromkeys(row[key] for row in done)) for key in ("heads", "pass"))
    figure, axes = plt.subplots(
        len(passes),
        len(shapes),
        figsize=(6 * len(shapes), 3 * len(passes)),
        squeeze=False,
        sharex=True,
    )
    for line, which in enumerate(passes):
        for column, shape in enumerate(shapes):
            axis = axes[line, column]
            panel = [row for row in done if (row["pass"], row["heads"]) == (which, shape)]
            pack, speed = operator.itemgetter("pack"), operator.itemgetter("tflops")
            timing.grouped_bars(axis, timing.bars_of(panel, "provider", pack, speed))
            axis.tick_params("x", rotation=40)
            axis.set_title(f"{which}, heads {shape}", fontsize=9)
            axis.set_ylabel("TFLOP/s")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    assert __doc__ is not None
    parser = timing.arguments(__doc__.partition("\n")[0], "attention")
    parser.add_argument("--packs", nargs="*", default=[], help="names of packs")
    parser.add_argument("--heads", nargs="*", default=[], help="as 16/8x128")
    parser.add_argument("--passes", nargs="*", default=[*PASSES], choices=PASSES)
    parser.add_argument("--providers", nargs="*", default=[], help="names of implementations")
    options = parser.parse_args(arguments)
    place = timing.device()
    packs = gpu_packs() if place.type == "cuda" else cpu_packs()
    if unknown := set(options.packs) - set(packs):
        parser.error(f"unknown packs {sorted(unknown)}; there are {', '.join(packs)}")
    shapes = GPU_HEADS if place.type == "cuda" else CPU_HEADS
    if options.heads:
        shapes = [parse_heads(text) for text in options.heads]
    rates = floors(place, options.rounds)
    print(f"floors: {rates[0] / 1e12:.1f} TFLOP/s, {rates[1] / 1e12:.3f} TB/s")
    rows = []
    for pack, lengths in packs.items():
        if options.packs and pack not in options.packs:
            continue
        for heads in shapes:
            measured = measure(pack, lengths, heads, options.passes, rates, options, place)
            show(measured)
            rows += measured
    results = {"flops_per_second": rates[0], "bytes_per_second": rates[1], "rows": rows}
    timing.write_results(options.output, "python -m benchmarks.attention", results)
    plot(rows, options.output.with_suffix(".png"))


def parse_heads(text: str) -> Heads:
    """``16/8x128``: query heads, key heads, head dimension."""
    heads, _, size = text.partition("x")
    q_heads, _, key_heads = heads.partition("/")
    return int(q_heads), int(key_heads), int(size)


if __name__ == "__main__":
    main()
