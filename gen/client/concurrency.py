"""How many requests are in flight: a gentle increase, a steeper decrease.

Where a server tells how many requests wait in its queue, that number is kept in a band: short, so
that little work is lost with a server, and never empty, so that its batch is always full. Where it
does not, latency decides: once every further request only makes all others slower by as much, the
server is full.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

SLOW_START = 1.5  # growth until the server was full for the first time
DECREASE = 0.85
STEP = 0.05  # increase after that, as a share of the limit
FULL = 0.8  # elasticity of latency at which a server counts as full


class Slots:
    """A semaphore whose limit can change; first come, first served."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0
        self.waiting: deque[asyncio.Future[None]] = deque()

    async def acquire(self) -> None:
        """Wait for a slot, behind those that wait already; cancelled, none is taken."""
        if self.taken < self.limit and not self.waiting:
            self.taken += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self.waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was given a slot meanwhile
                self.release()
            raise

    def release(self) -> None:
        """Give a slot back to whoever waits longest."""
        self.taken -= 1
        self.wake()

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """A slot for as long as the block runs."""
        await self.acquire()
        try:
            yield
        finally:
            self.release()

    async def yield_if_fewer(self) -> None:
        """Wait for a new turn where the limit has become smaller than what is in flight."""
        while self.taken > self.limit:
            self.release()
            try:
                await self.acquire()
            except BaseException:
                self.taken += 1  # the caller releases what it had
                raise

    def resize(self, limit: int) -> None:
        """Change the limit; slots above a smaller one are given back as they are released."""
        self.limit = limit
        self.wake()

    def wake(self) -> None:
        """Give free slots to those that wait."""
        while self.waiting and self.taken < self.limit:
            turn = self.waiting.popleft()
            if not turn.done():
                self.taken += 1
                turn.set_result(None)

    @property
    def full(self) -> bool:
        """Whether more would be in flight if the limit allowed it."""
        return self.taken >= self.limit and bool(self.waiting)


@dataclass
class AdaptiveLimit:
    """The limit of one server.

    Args:
        largest: never exceeded.
        smallest: never gone below; also the start.
        queue_low: fewer waiting requests than this ask for more in flight.
        queue_high: more than this ask for fewer.
    """

    largest: int
    smallest: int
    queue_low: int = 8
    queue_high: int = 64
    limit: int = 0
    starting: bool = True  # the server was not full yet
    measured: int = 0  # requests of this window
    settling: bool = True  # requests that began under the last limit are still ending
    seconds: float = 0.0
    tokens: int = 0
    before: tuple[int, float] | None = None  # limit and seconds a token of the last window

    def __post_init__(self) -> None:
        self.limit = self.limit or min(self.smallest, self.largest)

    def observe_queue(self, waiting: float, in_flight: int) -> int:
        """The next limit from the number of requests that wait in the server.

        Args:
            waiting: requests the server has not begun.
            in_flight: requests of ours; above the limit, the last decrease is still at work.
        """
        if waiting > self.queue_high:
            if in_flight <= self.limit:
                self.decrease()
        elif waiting < self.queue_low:
            if in_flight >= self.limit:  # otherwise more is allowed than there is to do
                self.increase()
        else:
            self.starting = False
        return self.limit

    def observe_request(self, seconds: float, tokens: int) -> int:
        """The next limit from a finished request, where the server shows no queue.

        A window is as many requests as the limit; every other one is left out while requests that
        began under the old limit end. By Little's law throughput stands still where latency grows
        as fast as the limit.
        """
        self.measured += 1
        self.seconds += seconds
        self.tokens += max(1, tokens)
        if self.measured < self.limit:
            return self.limit
        latency = self.seconds / self.tokens
        self.measured, self.seconds, self.tokens = 0, 0.0, 0
        self.settling = not self.settling
        if not self.settling:
            return self.limit
        previous, self.before = self.before, (self.limit, latency)
        if previous is not None and self.limit != previous[0]:
            change = self.limit / previous[0] - 1.0
            if (latency / previous[1] - 1.0) / change > FULL:
                self.decrease()
                return self.limit
        self.increase()
        return self.limit

    def increase(self) -> None:
        share = SLOW_START - 1.0 if self.starting else STEP
        step = max(1, round(share * self.limit))
        self.limit = min(self.largest, self.limit + step)

    def decrease(self) -> None:
        self.starting = False
        self.limit = max(self.smallest, int(DECREASE * self.limit))
