"""Units of work that any number of processes and machines do together, each unit once.

A unit is claimed by a lock on a file, which a killed process holds no longer, and leaves a file
behind when it is done. Writers begin with units of their own and then take what nobody has begun,
so the work ends also where some of them never start; nothing waits for a process that is not there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType

import pyarrow as pa
from tqdm import tqdm

from trainer.files import only_one, write_json

SAY_EVERY = 5.0  # seconds between a writer's notes of how far it is
LOOK_AGAIN = 0.5  # seconds between looks at units that other writers have begun
# Of glibc's mallopt: heaps that threads share, instead of 8 a core; bytes from which an array is
# memory of its own, which goes back when it is freed.
ARENA_MAX, MMAP_THRESHOLD = -8, -3
WORTH_A_PROCESS = 1 << 21  # tokens or bytes of text; fewer are done before another has started


@dataclass(frozen=True)
class Unit:
    """One unit of work."""

    name: str  # of its lock
    amount: int  # tokens or bytes of text, for the progress bar
    prepare: Callable[[], Callable[[], object]]  # gives what is called, in any process


@dataclass
class Progress:
    """How far one writer is with some units; kept beside their locks while it works."""

    label: str
    unit: str
    total: int  # of all writers
    writer: int
    writers: int
    processes: int
    done: int = 0  # by this writer
    host: str = field(default_factory=socket.gethostname)
    began: float = field(default_factory=time.time)  # seconds since the epoch
    now: float = field(default_factory=time.time)

    @property
    def speed(self) -> float:
        """Done a second."""
        return self.done / max(1e-9, self.now - self.began)

    def add(self, amount: int, path: Path) -> None:
        """Note what is done."""
        self.done += amount
        if time.time() - self.now > SAY_EVERY:
            self.now = time.time()
            write_json(path, asdict(self))


class Work:
    """This machine's processes, and which of several writers they are.

    Args:
        processes: at most; None: one for each core that this process may use.
        writer: this one among ``writers``: decides with which units it begins.
        writers: that share the work.
    """

    def __init__(self, processes: int | None = None, writer: int = 0, writers: int = 1) -> None:
        self.processes = processes or len(os.sched_getaffinity(0))
        self.writer = writer
        self.writers = writers
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Work:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
            self.pool = None

    def run(
        self,
        units: Sequence[Unit],
        locks: Path,
        label: str,
        unit: str,
        worth_a_process: int | None = None,
    ) -> None:
        """Do every unit, in some process on some machine.

        Args:
            units: the same for all writers, or what is left of them; a unit that is done already
                must return at once.
            locks: folder of their locks.
            label: of the progress bar.
            unit: that amounts are counted in.
            worth_a_process: amount below which no processes are started; None: of tokens or bytes.

        Raises:
            Exception: the first that a unit raised here.
        """
        if not units:
            return
        own = [one for place, one in enumerate(units) if place % self.writers == self.writer]
        others = [one for place, one in enumerate(units) if place % self.writers != self.writer]
        total = sum(one.amount for one in units)
        to_do = [*own, *others]
        do_all = self.here
        if self.processes > 1 and (
            self.pool is not None or total >= (worth_a_process or WORTH_A_PROCESS)
        ):
            do_all = self.in_pool
        progress = Progress(label, unit, total, self.writer, self.writers, self.processes)
        note = locks / f"writer-{self.writer}.json"
        locks.mkdir(parents=True, exist_ok=True)
        write_json(note, asdict(progress))
        with tqdm(
            total=total, desc=label, unit=unit, unit_scale=True, leave=False, dynamic_ncols=True
        ) as bar:

            def finished(unit: Unit) -> None:
                bar.update(unit.amount)
                progress.add(unit.amount, note)

            while to_do := do_all(to_do, locks, finished):
                time.sleep(LOOK_AGAIN)
        note.unlink(missing_ok=True)

    def here(self, units: list[Unit], locks: Path, finished: Callable[[Unit], None]) -> list[Unit]:
        """One unit after the other; returns those that other writers hold."""
        held = []
        for one in units:
            if claimed(locks / f"{one.name}.lock", one.prepare()):
                finished(one)
            else:
                held.append(one)
        return held

    def in_pool(
        self, units: list[Unit], locks: Path, finished: Callable[[Unit], None]
    ) -> list[Unit]:
        """A unit a process; few are prepared ahead. Returns those that other writers hold."""
        if self.pool is None:
            # Not forked: threads of a server or of BLAS may hold locks here.
            self.pool = ProcessPoolExecutor(
                self.processes, get_context("spawn"), initializer=begin_process
            )
        held: list[Unit] = []
        running: dict[Future[bool], Unit] = {}
        waiting = iter(units)
        while True:
            while len(running) <= self.processes and (one := next(waiting, None)) is not None:
                lock = locks / f"{one.name}.lock"
                call = one.prepare()
                with without_main():
                    running[self.pool.submit(claimed, lock, call)] = one
            if not running:
                return held
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                one = running.pop(future)
                if future.result():
                    finished(one)
                else:
                    held.append(one)


def claimed(lock: Path, do: Callable[[], object]) -> bool:
    """Do a unit unless another process does it at this moment; whether it is done now."""
    try:
        with only_one(lock, wait=False):
            do()
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def without_main() -> Iterator[None]:
    """Keep processes that start here from importing the program: they need a part of it."""
    main, known = sys.modules["__main__"], {}
    for name in ("__spec__", "__file__"):
        if hasattr(main, name):
            known[name] = getattr(main, name)
            delattr(main, name)
    main.__spec__ = None
    try:
        yield
    finally:
        for name, value in known.items():
            setattr(main, name, value)


def hold_little_memory() -> None:
    """Have what is freed go back to the system: Arrow's own allocator keeps hundreds of MB."""
    pa.set_memory_pool(pa.system_memory_pool())
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        library = ctypes.CDLL(None)
        library.mallopt(ARENA_MAX, 2)
        library.mallopt(MMAP_THRESHOLD, 1 << 20)


def begin_process() -> None:
    """Set up a process of the pool: one thread, and no life of its own."""
    hold_little_memory()
    pa.set_cpu_count(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = os.getppid()

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
