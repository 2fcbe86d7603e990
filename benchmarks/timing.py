"""How every benchmark here measures: interleaved, warmed up, medians, with what it ran on."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from kernels import clock
from trainer.files import write_json

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "flash-attn",
    "fa3-fwd",
    "flash-attn-4",
    "liger-kernel",
    "cut-cross-entropy",
)
Candidate = clock.Call
Row = dict[str, Any]


def device() -> torch.device:
    """The GPU, or the CPU and a line that says so."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    print("No CUDA device: small shapes on the CPU; they say nothing about a GPU.\n")
    return torch.device("cpu")


def environment() -> dict[str, Any]:
    """Processor, driver, versions and date; clocks and power while the GPU multiplies matrices."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions,
        "threads": torch.get_num_threads(),
        "processor": processor(),
    }
    if torch.cuda.is_available():
        query = "driver_version,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
        identity = f"--id=GPU-{torch.cuda.get_device_properties().uuid}"
        a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        for _ in range(1000):  # an idle GPU lowers its clocks; these outlast the question
            a @ a
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", identity],
            capture_output=True,
            text=True,
            check=False,
        )
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
        found[query] = done.stdout.strip()
    return found


def processor() -> str:
    """Name of the CPU, as the kernel gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def interleaved(
    candidates: dict[str, Candidate], rounds: int, flush: bool = True
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Time all candidates in turn, round after round.

    Args:
        candidates: what to call, by name.
        rounds: measurements of each.
        flush: on CUDA, overwrite the L2 cache before each measurement.

    Returns:
        For each name the median, lowest and highest seconds; and for each that failed, why.
    """
    on_gpu = torch.cuda.is_available()
    place = torch.device("cuda" if on_gpu else "cpu")
    cache = torch.empty(256 << 20, dtype=torch.uint8, device=place) if on_gpu and flush else None
    times, failed = clock.interleaved(
        candidates, place, rounds, warm_ups=3 if on_gpu else 1, cache=cache
    )
    return {
        name: {"median": statistics.median(own), "lowest": min(own), "highest": max(own)}
        for name, own in times.items()
    }, {name: reason(error) for name, error in failed.items()}


def reason(error: Exception) -> str:
    """What a failed peer's row says: kind and first line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def peak_bytes(call: Candidate) -> int | None:
    """Bytes that one call allocates at its peak; None on a CPU, where torch does not count them."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def print_table(
    title: str,
    rows: list[Row],
    names: tuple[str, ...],
    values: Callable[[Row], Row],
    floats: str | tuple[str, ...],
) -> None:
    """A line a row: what ``names`` it has, then its ``values``, or why it failed.

    Args:
        title: above the table.
        rows: of a benchmark's file.
        names: keys that every row has.
        values: columns of a row that has not failed; None is an empty cell.
        floats: how numbers are written, for all columns or for each.
    """
    print(f"\n{title}")
    lines = [
        {name: row[name] for name in names}
        | ({"failed": row["failed"]} if "failed" in row else values(row))
        for row in rows
    ]
    print(tabulate(lines, "keys", "plain", floatfmt=floats))


def bars_of(
    rows: list[Row], name: str, group: Callable[[Row], str], value: Callable[[Row], float]
) -> dict[str, dict[str, float]]:
    """Heights of bars by ``name`` and group, of rows that have not failed."""
    bars: dict[str, dict[str, float]] = {}
    for row in rows:
        if "failed" not in row:
            bars.setdefault(row[name], {})[group(row)] = value(row)
    return bars


def grouped_bars(axis: Any, bars: dict[str, dict[str, float]]) -> None:
    """Bars of every name side by side in each group; ``bars`` are heights by name and group."""
    groups = list(dict.fromkeys(group for heights in bars.values() for group in heights))
    width = 0.8 / max(1, len(bars))
    for place, (name, heights) in enumerate(bars.items()):
        left = [groups.index(group) + width * place for group in heights]
        axis.bar(left, list(heights.values()), width, label=name, align="edge")
    axis.set_xticks([index + 0.4 for index in range(len(groups))])
    axis.set_xticklabels(groups, fontsize=8)


def arguments(description: str, question: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    place = "cpu"
    if torch.cuda.is_available():
        place = torch.cuda.get_device_name().lower().replace(" ", "-")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{question}-{place}.json")
    return parser


def write_results(path: Path, command: str, results: Any) -> None:
    """JSON with the environment, in one piece or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"command": command, **environment(), "results": results})
    print(f"\nwritten: {path}")
