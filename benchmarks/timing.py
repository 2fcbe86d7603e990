"""How every benchmark here measures: interleaved, warmed up, medians, with what it ran on."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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
FLUSHES = 16  # of the L2 cache; about 1 ms of an H200's time
Candidate = Callable[[], object]


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
    """Time all candidates in turn, round after round, so that clocks and heat hit them alike.

    Args:
        candidates: what to call, by name.
        rounds: measurements of each; the order shifts by one every round.
        flush: on CUDA, overwrite the L2 cache before each measurement, for so long that the host
            has issued the call when its time begins: what is measured is the GPU's work alone.

    Returns:
        For each name the median, lowest and highest seconds; and for each that failed, why.
    """
    on_gpu = torch.cuda.is_available()
    cache = torch.empty(256 << 20, dtype=torch.uint8, device="cuda") if on_gpu and flush else None
    failed: dict[str, str] = {}
    for name, call in candidates.items():
        try:
            for _ in range(3 if on_gpu else 1):
                call()
            if on_gpu:
                torch.cuda.synchronize()
        except Exception as error:  # a peer may fail in its own way; the others go on
            failed[name] = reason(error)
            if on_gpu:
                torch.cuda.empty_cache()
    names = [name for name in candidates if name not in failed]
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            times[name].append(once(candidates[name], cache))
    return {
        name: {"median": statistics.median(own), "lowest": min(own), "highest": max(own)}
        for name, own in times.items()
    }, failed


def reason(error: Exception) -> str:
    """What a failed peer's row says: kind and first line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def once(call: Candidate, cache: torch.Tensor | None) -> float:
    """Seconds of one call."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    if cache is not None:
        for _ in range(FLUSHES):
            cache.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3


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


def grouped_bars(axis: Any, groups: list[str], bars: dict[str, dict[str, float]]) -> None:
    """Bars of every name side by side in each group; ``bars`` are heights by name and group."""
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
