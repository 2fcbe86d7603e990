"""How the self-check and the benchmarks time: calls in turn, round after round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Call = Callable[[], object]
FLUSHES = 16  # of the L2 cache; about 1 ms of an H200's time


def interleaved(
    calls: Mapping[str, Call],
    device: torch.device,
    rounds: int,
    *,
    warm_ups: int = 1,
    cache: Tensor | None = None,
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Time all calls in turn, so that clocks and heat hit them alike.

    Args:
        calls: what to time, by name.
        device: where they work.
        rounds: measurements of each; the order shifts by one every round.
        warm_ups: calls of each before, which are not measured.
        cache: see :func:`seconds_of`.

    Returns:
        The seconds of every measurement of each call that never failed, and what the others raised.
    """
    failed: dict[str, Exception] = {}
    for name, call in calls.items():
        try:
            for _ in range(warm_ups):
                call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:  # it may fail in its own way; the others go on
            failed[name] = error
            if device.type == "cuda":
                torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name in calls if name not in failed}
    for turn in range(rounds):
        names = list(times)
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            try:
                times[name].append(seconds_of(calls[name], device, cache))
            except Exception as error:  # such as out of memory beside what the others keep
                failed[name] = error
                del times[name]
    return times, failed


def seconds_of(call: Call, device: torch.device, cache: Tensor | None = None) -> float:
    """Seconds of one call.

    Args:
        call: what to time.
        device: where it works.
        cache: on CUDA, bytes as large as the L2 cache, which are overwritten before for so long
            that the host has issued the call when its time begins: what is measured is the GPU's
            work alone.
    """
    if device.type != "cuda":
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
