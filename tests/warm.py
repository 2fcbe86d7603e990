"""Programs in processes that have imported everything already.

Each is forked from one process that imports what the programs need and does nothing else: starting
``train.py`` costs milliseconds instead of three seconds of CPU time. ``tests/test_pipeline.py``,
``tests/test_wheel.py`` and others start fresh interpreters.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

REPOSITORY = Path(__file__).parents[1]
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.imported"])


class Program:
    """``python ARGUMENTS`` in the repository; used as a :class:`subprocess.Popen`.

    Args:
        arguments: a script and its arguments, or ``-m``, a module and its arguments.
    """

    def __init__(self, *arguments: str) -> None:
        self.arguments = arguments
        self.output = Path(tempfile.mkdtemp(prefix="program-"))
        self.process = PROCESSES.Process(
            target=run, args=(arguments, dict(os.environ), str(self.output))
        )
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        """Negative: the number of the signal that ended it; None while it runs."""
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout or 0)
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it printed to stdout and to stderr, once it has ended."""
        self.wait(timeout)
        return self.said("stdout"), self.said("stderr")

    def said(self, stream: str) -> str:
        """What it has printed so far to ``stdout`` or ``stderr``."""
        return (self.output / stream).read_text()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.kill()
        self.wait()


def run(arguments: tuple[str, ...], environment: dict[str, str], output: str) -> None:
    """What the interpreter does with its command line."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{output}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(REPOSITORY)
    try:
        if arguments[0] == "-m":
            sys.argv[:] = list(arguments[1:])
            sys.path.insert(0, str(REPOSITORY))
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv[:] = list(arguments)
            sys.path.insert(0, str((REPOSITORY / arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
