"""Verdicts on backends: how they are timed, chosen from and kept."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..clock import Call, interleaved

ROUNDS = 5


class Verdict(NamedTuple):
    """``failed`` says why a backend must not be used, or is empty."""

    backend: str
    failed: str
    seconds: float | None  # forward and backward, at the shape that was asked for


class Choice(NamedTuple):
    """What ``auto`` is: the fastest backend that is right."""

    backend: str
    line: str  # for the log: it, the runner-up, their ratio and what failed
    verdicts: list[Verdict]


def distance(found: Tensor, exact: Tensor) -> float:
    """The largest error."""
    return (found.double() - exact).abs().max().item()


def too_far(name: str, found: Tensor, exact: Tensor, plain_error: float) -> str:
    """Whether ``found`` is more than twice as far from float64 as plain PyTorch."""
    if not found.isfinite().all():
        return f"{name} is not finite"
    # In half precision the last rounding is the largest by far; in fp32 those of the sums are not.
    roundings = 2 if found.dtype in (torch.float16, torch.bfloat16) else 32
    rounding = roundings * torch.finfo(found.dtype).eps * exact.abs().max().item()
    error, allowed = distance(found, exact), 2 * plain_error + rounding
    if error <= allowed:
        return ""
    return f"{name} is off by {error:.2g}, at most {allowed:.2g} is allowed"


def median_seconds(
    calls: Mapping[str, Call], device: torch.device, rounds: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Median seconds of each call, taken in turn; and why a call failed."""
    times, failed = interleaved(calls, device, rounds)
    return {name: statistics.median(own) for name, own in times.items()}, {
        name: f"raised {type(error).__name__} at the run's shape"  # out of memory
        for name, error in failed.items()
    }


def choose(what: str, verdicts: list[Verdict]) -> Choice:
    """The fastest backend that is right, and the line that says so.

    Raises:
        ValueError: none is right; names what failed in each.
    """
    failures = "; ".join(f"{v.backend}: {v.failed}" for v in verdicts if v.failed)
    right = sorted(
        (v for v in verdicts if not v.failed), key=lambda v: (v.seconds is None, v.seconds)
    )
    if not right:
        raise ValueError(f"no {what} passes the self-check on this device: {failures}")
    best = right[0]
    line = f"{what}: {best.backend}"
    if len(right) > 1 and best.seconds and right[1].seconds:
        ratio = right[1].seconds / best.seconds
        line += f", {best.seconds * 1e3:.2f} ms; {right[1].backend} takes {ratio:.2f} x as long"
    elif len(verdicts) > 1:
        line += ", the only one that is right here"
    if failures:
        line += f" (refused: {failures})"
    return Choice(best.backend, line, verdicts)


def cached(key: dict[str, Any], make: Callable[[], list[Verdict]], file: Path) -> list[Verdict]:
    """The verdicts of a key, from the file or newly made."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    kept: dict[str, Any] = {}
    if file.exists():
        kept = json.loads(file.read_text())
    if name in kept:
        return [Verdict(*row) for row in kept[name]["verdicts"]]
    verdicts = make()
    if file.exists():  # what other processes have written since
        kept = json.loads(file.read_text())
    kept[name] = {"key": key, "verdicts": verdicts}
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(kept, indent=1) + "\n")
    unfinished.replace(file)
    return verdicts


def cache_file() -> Path:
    """``megadocs/kernel-verdicts.json`` in the user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(folder) / "megadocs" / "kernel-verdicts.json"


def circumstances(device: torch.device) -> dict[str, Any]:
    """Everything but the shape that could change a verdict."""
    import triton

    found: dict[str, Any] = {
        "device": "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "sources": source_hash(),
    }
    if device.type == "cuda":
        driver = Path("/proc/driver/nvidia/version")
        found["device"] = torch.cuda.get_device_name(device)
        found["cuda driver"] = getattr(torch._C, "_cuda_getDriverVersion")()  # noqa: B009
        found["driver"] = driver.read_text() if driver.exists() else ""
    return found


def source_hash() -> str:
    """Hash of every source and table of ``kernels/``."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.json")]):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]
