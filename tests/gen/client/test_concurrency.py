"""The number of requests in flight: slots, control, and both against simulated servers."""

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen.client.concurrency import AdaptiveLimit, Slots
from gen.client.routing import Routing, ServersLost
from gen.serving.load import ServerLoad, parse_load


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.integers(1, 40), st.integers(0))
def test_slots_are_never_exceeded_nor_lost(limits: list[int], tasks: int, seed: int) -> None:
    chooser = random.Random(seed)

    async def run() -> None:
        slots, order = Slots(limits[0]), []

        async def one(number: int) -> None:
            await slots.acquire()
            order.append(number)
            try:
                assert slots.taken <= max(limits)
                for _ in range(chooser.randrange(4)):
                    await asyncio.sleep(0)
                    await slots.yield_if_fewer()
            finally:
                slots.release()

        running = [asyncio.create_task(one(number)) for number in range(tasks)]
        for limit in limits:
            await asyncio.sleep(0)
            slots.resize(limit)
            chooser.choice(running).cancel()
        ends = await asyncio.gather(*running, return_exceptions=True)
        assert all(end is None or isinstance(end, asyncio.CancelledError) for end in ends)
        assert order == sorted(order)  # first come, first served
        assert slots.taken == 0
        assert not any(not turn.done() for turn in slots.waiting)

    asyncio.run(run())


def test_a_smaller_limit_is_reached_as_slots_come_back() -> None:
    async def run() -> None:
        slots = Slots(4)
        for _ in range(4):
            await slots.acquire()
        slots.resize(2)
        waiter = asyncio.create_task(slots.acquire())
        for taken in (3, 2, 1):
            slots.release()
            await asyncio.sleep(0)
            assert waiter.done() == (taken == 1)
        assert slots.taken == 2

    asyncio.run(run())


class QueueServer:
    """Runs at most ``capacity`` requests; the others wait."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.in_flight = capacity, 0

    def step(self, limit: int) -> float:
        """A tenth of the requests end, new ones come up to the limit; how many wait."""
        self.in_flight = max(limit, self.in_flight - max(1, self.capacity // 10))
        return max(0.0, self.in_flight - self.capacity)


@pytest.mark.parametrize("capacity", [40, 300, 900])
def test_the_queue_is_kept_short_and_not_empty(capacity: int) -> None:
    server, control = QueueServer(capacity), AdaptiveLimit(1024, 32)
    waiting = []
    for _ in range(400):
        queue = server.step(control.limit)
        waiting.append(queue)
        control.observe_queue(queue, server.in_flight)
    settled = waiting[100:]
    assert sum(queue > 0 for queue in settled) > 0.9 * len(settled)
    assert sum(settled) / len(settled) < 2 * control.queue_high
    assert control.limit >= capacity * 0.85


def test_a_server_that_becomes_faster_or_slower_is_followed() -> None:
    server, control = QueueServer(200), AdaptiveLimit(2000, 32)
    for capacity in (200, 800, 100):
        server.capacity = capacity
        for _ in range(300):
            control.observe_queue(server.step(control.limit), server.in_flight)
        assert 0.85 * capacity <= control.limit <= capacity + 2 * control.queue_high


def test_no_more_is_allowed_where_there_is_nothing_more_to_do() -> None:
    control = AdaptiveLimit(1000, 10)
    for _ in range(50):
        control.observe_queue(0, 5)
    assert control.limit == 10


@pytest.mark.parametrize("capacity", [20, 150, 5000])
def test_latency_alone_finds_the_capacity(capacity: int) -> None:
    """Batches get a little slower as they grow; above the capacity requests only wait."""
    control, chooser = AdaptiveLimit(1024, 16), random.Random(0)
    limits = []
    for _ in range(60_000):
        load = control.limit
        batch = 10.0 + 0.02 * min(load, capacity)  # milliseconds a token
        latency = batch * max(1.0, load / capacity)
        tokens = chooser.randrange(200, 1000)
        limits.append(control.observe_request(tokens * latency / 1000, tokens))
    settled = limits[len(limits) // 2 :]
    mean = sum(settled) / len(settled)
    assert min(capacity, 1024) * 0.7 <= mean <= min(1024, max(capacity * 1.8, capacity + 60))


def test_prometheus_pages_of_three_servers() -> None:
    sglang = (
        "# HELP sglang:num_queue_reqs The number of requests in the waiting queue.\n"
        'sglang:num_queue_reqs{model_name="m",dp_rank="0"} 3.0\n'
        'sglang:num_queue_reqs{model_name="m",dp_rank="1"} 4.0\n'
        'sglang:num_running_reqs{model_name="m",dp_rank="0"} 1e2\n'
    )
    assert parse_load(sglang) == ServerLoad(7.0, 100.0)
    assert parse_load("vllm:num_requests_waiting 2\n") == ServerLoad(2.0, 0.0)
    llama = "llamacpp:requests_processing 4\nllamacpp:requests_deferred 1\n"
    assert parse_load(llama) == ServerLoad(1.0, 4.0)
    assert parse_load("process_cpu_seconds_total 5\n") is None


# ---- routing ----


def test_a_lost_server_moves_only_its_own_documents() -> None:
    now = 0.0
    urls = ["http://a", "http://b", "http://c"]
    routing = Routing(urls, 10.0, clock=lambda: now)
    names = [f"document {i}" for i in range(300)]
    before = {name: routing.choose(name) for name in names}
    assert set(before.values()) == set(urls)
    routing.down("http://b", "gone")
    for name in names:
        moved = routing.choose(name) != before[name]
        assert moved == (before[name] == "http://b")
    now = 1.0  # its pause is over: it is tried again
    assert {name: routing.choose(name) for name in names} == before


def test_pauses_grow_once_a_failure_and_the_outage_is_bounded() -> None:
    now = 0.0
    routing = Routing(["http://a"], 10.0, clock=lambda: now)
    for _ in range(50):  # all requests in flight fail at once
        routing.down("http://a", "ConnectError")
    assert routing.routes["http://a"].pause == 0.25
    assert routing.choose("x") is None
    routing.check()
    while now < 10.0:
        now = routing.routes["http://a"].closed_until
        routing.down("http://a", "ConnectError")
    with pytest.raises(ServersLost, match=r"for 10 s .*http://a: ConnectError"):
        routing.check()
    routing.up("http://a")
    routing.check()
    assert routing.choose("x") == "http://a"


def test_a_server_that_was_given_up_ends_the_wait() -> None:
    routing = Routing(["http://a"], 1000.0, failure=lambda: "it died 5 times")
    with pytest.raises(ServersLost, match="it died 5 times"):
        asyncio.run(routing.server_for("x"))
