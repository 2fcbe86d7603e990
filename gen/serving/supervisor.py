"""A server process that is started, watched and restarted when it dies or hangs."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from gen.client.connection import Connection

logger = logging.getLogger(__name__)

TREE = Path(__file__).resolve().parents[2]
GUARD = Path(__file__).with_name("parent_watch.py")
POLL = 0.5  # seconds between looks at the process
HEALTH_EVERY = 15.0  # seconds; SGLang's /health generates a token and sleeps a second
HEALTH_TIMEOUT = 30.0  # seconds
HANGS_AFTER = 4  # unhealthy answers in a row
STABLE_AFTER = 600.0  # seconds of health that give all restarts back
LONGEST_PAUSE = 60.0  # seconds between restarts
PORTS = 20_000, 32_768  # above Ray's workers, below outgoing connections (Linux, macOS, Windows)


class ServerFailed(ValueError):
    """A server that does not start, or died too often; the message holds the end of its log."""


@dataclass
class SupervisedServer:
    """One server on one port.

    Args:
        name: for messages.
        command: what to run; it must listen at ``port``.
        port: where it will answer ``/health``.
        log: file that takes its output.
        start_timeout: seconds until it must be healthy.
        restarts: how often it may be started again; ten healthy minutes give all of them back.
        environment: variables added to this process's.
        hangs_after: unhealthy answers in a row that make it hang.
    """

    name: str
    command: list[str]
    port: int
    log: Path
    start_timeout: float
    restarts: int
    environment: dict[str, str] = field(default_factory=dict)
    hangs_after: int = HANGS_AFTER
    failure: str | None = None  # set when it is given up
    restarted: int = 0
    process: subprocess.Popen[bytes] | None = None
    stopping: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> SupervisedServer:
        if self.process is None:
            self.spawn()
        try:
            self.wait_until_healthy()
        except BaseException:
            self.kill()
            raise
        self.watcher = threading.Thread(target=self.watch, name=f"watch {self.name}", daemon=True)
        self.watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.terminate()
        self.watcher.join()
        self.kill()

    def spawn(self) -> None:
        """Start the process in a session of its own, under the guard."""
        logger.debug(shlex.join(self.command))
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(GUARD), *self.command],
                stdin=subprocess.PIPE,  # its end tells the guard of ours
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**without_our_tree(os.environ), **self.environment},
            )

    def wait_until_healthy(self) -> None:
        """Return when ``/health`` answers 200.

        Raises:
            ServerFailed: it ended, or stayed unhealthy for ``start_timeout`` seconds.
        """
        deadline = time.monotonic() + self.start_timeout
        while time.monotonic() < deadline and self.alive() and not self.stopping.is_set():
            if self.healthy():
                return
            self.stopping.wait(POLL)
        if self.stopping.is_set():
            return
        state = "hangs" if self.alive() else f"ended with status {self.status()}"
        raise ServerFailed(
            f"the {self.name} server {state} before it was healthy. Its log {self.log} ends:\n"
            f"{self.log_tail()}"
        )

    def watch(self) -> None:
        """Restart the server whenever it ends or hangs, until it is stopped or given up."""
        healthy_since = last_look = time.monotonic()
        unhealthy = used = 0
        while not self.stopping.wait(POLL):
            now = time.monotonic()
            if self.alive() and now - last_look >= HEALTH_EVERY:
                last_look = now
                unhealthy = 0 if self.healthy() else unhealthy + 1
                if not unhealthy and now - healthy_since >= STABLE_AFTER:
                    used = 0
            if self.stopping.is_set() or (self.alive() and unhealthy < self.hangs_after):
                continue
            state = "hangs" if self.alive() else f"ended with status {self.status()}"
            self.kill()
            if used >= self.restarts:
                self.failure = (
                    f"the {self.name} server {state} after {used} restarts "
                    f"(generator.restarts={self.restarts}). Its log {self.log} ends:\n"
                    f"{self.log_tail()}"
                )
                logger.error(f"given up: {self.failure}")
                return
            logger.warning(
                f"the {self.name} server {state}; its log {self.log} ends:\n{self.log_tail(10)}\n"
                f"restart {used + 1} of {self.restarts}"
            )
            if used and self.stopping.wait(min(LONGEST_PAUSE, 2.0**used)):
                return
            used += 1
            self.restarted += 1
            self.spawn()
            try:
                self.wait_until_healthy()  # no second look: requests may keep it busy from now on
                unhealthy = 0
            except ServerFailed:  # the next round's matter
                unhealthy = self.hangs_after
            healthy_since = last_look = time.monotonic()

    def healthy(self) -> bool:
        """Whether ``/health`` answers 200."""
        try:
            return Connection().get(f"{self.url}/health", HEALTH_TIMEOUT).status_code == 200
        except httpx.HTTPError:
            return False

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def status(self) -> int | None:
        return self.process.returncode if self.process else None

    def terminate(self) -> None:
        """Ask the process and its children to end, and wait a while."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20.0)

    def kill(self) -> None:
        """End the process and whatever it left in its group."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            if self.process.stdin:
                self.process.stdin.close()

    def log_tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def free_port() -> int:
    """A port nobody listens at, and that the system gives to no outgoing connection.

    A server takes its port up to minutes later, and again when it is started anew; meanwhile
    clients that look for it could be given the very port that they look at.
    """
    chooser = random.SystemRandom()  # a seeded one would give every process the same
    while True:
        port = chooser.randrange(*PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def without_our_tree(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables without our folders in PYTHONPATH, which launchers need and servers must not.

    A server's own Python environment may hold another package called ``kernels``.
    """
    ours = {str(TREE), str(TREE / "trainer" / "plugins")}
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    foreign = [path for path in paths if path and path not in ours]
    kept = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    return kept | ({"PYTHONPATH": os.pathsep.join(foreign)} if foreign else {})
