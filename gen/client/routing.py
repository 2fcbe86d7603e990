"""Which server a document goes to: always the same one, and another only while that one is down."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0  # seconds a server that failed is left alone
LOOK = 1.0  # seconds between looks for a server's final failure


class ServersLost(ConnectionError):
    """No server is left, or none came back in time; ends the job."""


@dataclass
class Route:
    """What is known of one server."""

    url: str
    down_since: float | None = None
    closed_until: float = 0.0
    pause: float = 0.0
    problem: str = ""
    told: bool = False  # the server itself said until when


@dataclass
class Routing:
    """Sticky routing by rendezvous hashing, with failover.

    Args:
        urls: servers of the same model.
        outage_seconds: how long all of them may be down at once.
        failure: why servers that were started here are given up, or None.
    """

    urls: list[str]
    outage_seconds: float
    failure: Callable[[], str | None] = lambda: None
    clock: Callable[[], float] = time.monotonic
    routes: dict[str, Route] = field(init=False)

    def __post_init__(self) -> None:
        self.routes = {url: Route(url) for url in self.urls}

    def order(self, document_id: str) -> list[str]:
        """All servers, the document's own first: losing one moves only its own documents."""
        if len(self.urls) == 1:
            return self.urls
        return sorted(self.urls, key=lambda url: weight(document_id, url))

    def choose(self, document_id: str) -> str | None:
        """The first server of the document's order that may be tried now."""
        now = self.clock()
        for url in self.order(document_id):
            if self.routes[url].closed_until <= now:
                return url
        return None

    def up(self, url: str) -> None:
        """Note an answer."""
        route = self.routes[url]
        if route.told and route.closed_until > self.clock():
            return  # an earlier request's answer
        if route.down_since is not None:
            self.routes[url] = Route(url)

    def down(
        self, url: str, problem: str, pause: float = FIRST_PAUSE, told: float | None = None
    ) -> None:
        """Note that a server did not take a request; many requests at once count as one.

        Args:
            url: the server.
            problem: for messages.
            pause: seconds it is left alone, at least.
            told: seconds that the server itself asked for.
        """
        route, now = self.routes[url], self.clock()
        route.problem = problem
        if route.closed_until > now:
            return
        route.down_since = now if route.down_since is None else route.down_since
        route.pause = min(LONGEST_PAUSE, max(pause, 2 * route.pause))
        route.told = told is not None
        route.closed_until = now + (route.pause if told is None else max(told, FIRST_PAUSE))

    def refuse(self, url: str, problem: str) -> None:
        """Never use a server again."""
        route = self.routes[url]
        route.problem, route.told, route.closed_until = problem, True, math.inf
        route.down_since = route.down_since or self.clock()

    def check(self) -> None:
        """Raise ServersLost where waiting is no use."""
        if failure := self.failure():
            raise ServersLost(failure)
        for route in self.routes.values():  # asked with every request
            if route.down_since is None:
                return
        if all(route.closed_until == math.inf for route in self.routes.values()):
            raise ServersLost("; ".join(route.problem for route in self.routes.values()))
        now = self.clock()
        since = [route.down_since for route in self.routes.values()]
        if all(began is not None and now - began > self.outage_seconds for began in since):
            problems = "; ".join(f"{route.url}: {route.problem}" for route in self.routes.values())
            raise ServersLost(
                f"no server has answered for {self.outage_seconds:.0f} s "
                f"(generator.outage_seconds): {problems}"
            )

    async def server_for(self, document_id: str) -> str:
        """The server to ask, waiting while all are down.

        Raises:
            ServersLost: none is left, or the outage lasts too long.
        """
        while True:
            self.check()
            url = self.choose(document_id)
            if url is not None:
                return url
            next_try = min(route.closed_until for route in self.routes.values()) - self.clock()
            await asyncio.sleep(min(LOOK, max(0.0, next_try)))


def weight(document_id: str, url: str) -> bytes:
    """The smallest of these decides (Thaler and Ravishankar, 1998)."""
    return hashlib.blake2b(f"{document_id}\0{url}".encode(), digest_size=8).digest()
