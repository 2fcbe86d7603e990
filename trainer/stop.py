"""Being told to stop: save what is done, on all ranks together, then hand the signal on.

Training saves at the next step's end, generation when the requests in flight are answered; both
look at :class:`StopSignals`. What cannot be interrupted in the middle ends where it stands
(:func:`stopping_at_once`) and leaves nothing half-written.

Slurm's ``--signal``, a preemption, ``scancel``, submitit's time-out, Ray's cancellation and Ctrl-C
are signals. What they meant before a program listened for them (submitit requeues its job, a plain
process ends) still happens, once everything is saved.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

# A job that is told several things at once does the last of these: submitit's SIGUSR2 requeues.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SLURM_KILLS = 60.0  # seconds after which a rank that waits for its job's end ends by itself


class Stopped(BaseException):
    """The work was stopped by a signal and is saved; only :func:`hand_on` should catch this."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class StopSignals:
    """Notes the signals of :data:`SIGNALS` while its block runs."""

    def __init__(self) -> None:
        self.wanted = 0  # 0, or 1 + place in SIGNALS: of several ranks the largest decides

    def __enter__(self) -> StopSignals:
        self.before = {number: signal.signal(number, self.receive) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.wanted and kind is None:  # came after the last look
            os.kill(os.getpid(), SIGNALS[self.wanted - 1])

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; a second Ctrl-C does not wait for the step's end."""
        if number == signal.SIGINT and self.wanted:
            raise KeyboardInterrupt
        self.wanted = max(self.wanted, 1 + SIGNALS.index(signal.Signals(number)))


@contextlib.contextmanager
def stopping_at_once(message: str) -> Iterator[None]:
    """A signal of :data:`SIGNALS` ends this block where it stands, as Ctrl-C ends any program.

    The block must leave nothing half-written when an exception goes through it.

    Raises:
        Stopped: a signal came; its message begins with ``message``.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise stopped(1 + SIGNALS.index(signal.Signals(number)), message)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped(wanted: int, message: str) -> Stopped:
    """The exception for what :attr:`StopSignals.wanted` says, all ranks taken together."""
    number = SIGNALS[wanted - 1]
    return Stopped(number, f"{message}, by {number.name}")


def hand_on(stop: Stopped) -> NoReturn:
    """Do what the signal would have done, had nobody listened for it.

    Under submitit the job is requeued, unless Slurm does that or has been told to end it. Otherwise
    the process exits with status 128 + signal.
    """
    requeue = signal.getsignal(signal.SIGUSR2)
    if "SUBMITIT_EXECUTOR" in os.environ and callable(requeue):
        if stop.number == signal.SIGUSR2 or slurm_job_runs_on():
            # Slurm ends the requeued job at once, with it the scontrol that asks for the requeue.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            requeue(signal.SIGUSR2, None)  # does not return on the first rank
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            time.sleep(SLURM_KILLS)  # an end now could end the rank that requeues
        raise SystemExit(128 + stop.number)
    handler = signal.getsignal(stop.number)
    if callable(handler):
        handler(stop.number, None)
    raise SystemExit(128 + stop.number)


def slurm_job_runs_on() -> bool:
    """Whether Slurm lets this job run: it was sent a signal, but not cancelled or preempted."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    if "SLURM_ARRAY_JOB_ID" in os.environ:  # one of its tasks has the id of the whole array
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False
    return done.stdout.strip() == "RUNNING"
