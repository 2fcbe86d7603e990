"""A server's own gauges, read from its Prometheus page."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from gen.client.connection import proxy_for, root_of

# Requests that a server has accepted and not begun.
WAITING = (
    "sglang:num_queue_reqs",
    "vllm:num_requests_waiting",
    "llamacpp:requests_deferred",
)
RUNNING = (
    "sglang:num_running_reqs",
    "vllm:num_requests_running",
    "llamacpp:requests_processing",
)


@dataclass(frozen=True)
class ServerLoad:
    """What a server is doing."""

    waiting: float
    running: float


def read_samples(page: str, names: Collection[str]) -> dict[str, float]:
    """Values of a Prometheus page by name, summed over labels; names it lacks are left out.

    A page that is none of Prometheus has no values.
    """
    values: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name in names:
                    values[sample.name] = values.get(sample.name, 0.0) + sample.value
    except ValueError:
        return {}
    return values


def parse_load(page: str) -> ServerLoad | None:
    """The load a Prometheus page tells of, summed over its ranks; None where it tells nothing."""
    values = read_samples(page, (*WAITING, *RUNNING))
    waiting = [values[name] for name in WAITING if name in values]
    if not waiting:
        return None
    return ServerLoad(waiting[0], sum(values[name] for name in RUNNING if name in values))


async def read_load(http: aiohttp.ClientSession, url: str) -> ServerLoad | None:
    """The load of the server at ``url``.

    Returns:
        None where ``/metrics`` is not served or names no queue.

    Raises:
        aiohttp.ClientError: the server does not answer.
    """
    async with http.get(f"{root_of(url)}/metrics", proxy=proxy_for(url)) as response:
        return parse_load(await response.text()) if response.status == 200 else None
