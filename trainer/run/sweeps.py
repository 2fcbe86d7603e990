"""The jobs of a sweep under any Hydra launcher: each ends by itself, with a value or a reason.

Hydra's launchers for submitit and Ray raise at the first job that fails and forget the others. Here
every job is waited for, and what became of it is said.
"""

from __future__ import annotations

import csv
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf

from trainer.files import read_sealed, replace_file
from trainer.plugins import importable_in_jobs
from trainer.slurm_jobs import ENDED, slurm_states

POLL_SECONDS = 2.0  # between looks at Slurm's queue
SAVE_SECONDS = 120.0  # that cancelled tasks of Ray have to save
LATE_SECONDS = 30.0  # a result may appear that long after its job has left the queue


@dataclass(frozen=True)
class JobEnd:
    """What became of one job: the value its program returned, or why there is none."""

    value: Any = None
    problem: str | None = None
    log: str | None = None  # file that tells more


Ended = Callable[[int, JobEnd], None]
Queued = Callable[[int, str], None]


def run_jobs(
    launcher: Launcher,
    jobs: Sequence[Sequence[str]],
    first: int = 0,
    ended: Ended = lambda index, end: None,
    queued: Queued = lambda index, job: None,
) -> list[JobEnd]:
    """Run the jobs with these overrides to their ends, all of them whatever happens to one.

    Args:
        first: number of the first of them in the sweep.
        ended: called with the place and the end of each job as soon as that is known.
        queued: called with the place of each job and the id that Slurm gave it.
    """
    if not jobs:
        return []
    with importable_in_jobs():
        library = type(launcher).__module__.removeprefix("hydra_plugins.")
        if library.startswith("hydra_submitit_launcher"):
            return run_by_submitit(launcher, jobs, first, ended, queued)
        if library.startswith("hydra_ray_launcher"):
            return run_by_ray(launcher, jobs, first, ended)
        if hasattr(launcher, "on_end"):  # of our pool
            launcher.on_end = lambda index, done: ended(index, end_of(done))
            return [end_of(done) for done in launcher.launch(jobs, initial_job_idx=first)]
        ends = []
        for index, job in enumerate(jobs):  # Hydra's own: one after the other
            ends.append(end_of(launcher.launch([job], initial_job_idx=first + index)[0]))
            ended(index, ends[-1])
        return ends


def end_of(done: JobReturn) -> JobEnd:
    """A job whose process lived until its end."""
    if done.status is JobStatus.COMPLETED:
        return JobEnd(done._return_value)
    error = done._return_value
    return JobEnd(problem=str(error) or type(error).__name__, log=getattr(error, "log", None))


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` in this block: a launcher lets nobody see its jobs."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class Submitted(Exception):
    """Leaves a launcher as soon as it has submitted its jobs."""

    def __init__(self, jobs: list[Any]) -> None:
        self.jobs = jobs


def run_by_submitit(
    launcher: Launcher, jobs: Sequence[Sequence[str]], first: int, ended: Ended, queued: Queued
) -> list[JobEnd]:
    """Submit by Hydra's launcher, wait ourselves: it would raise at the first failure."""
    import submitit

    submit = submitit.AutoExecutor.map_array

    def submit_and_leave(*arguments: Any) -> None:
        raise Submitted(submit(*arguments))

    try:
        with replaced(submitit.AutoExecutor, "map_array", submit_and_leave):
            launcher.launch(jobs, initial_job_idx=first)
    except Submitted as submitted:
        handles = submitted.jobs
    for index, job in enumerate(handles):
        queued(index, job.job_id)
    ends: dict[int, JobEnd] = {}
    left_queue: dict[int, float] = {}
    while len(ends) < len(handles):
        states = slurm_states([job.job_id for job in handles])
        for index, job in enumerate(handles):
            if index in ends:
                continue
            main = job.task(0)
            state = states.get(job.job_id, "") if states is not None else job.state
            if main.paths.result_pickle.exists():
                ends[index] = submitit_end(main)
            elif state not in ENDED:
                left_queue.pop(index, None)
            elif time.monotonic() - left_queue.setdefault(index, time.monotonic()) > LATE_SECONDS:
                ends[index] = JobEnd(problem=f"job {job.job_id} {ENDED[state]}", log=log_of(main))
            if index in ends:
                ended(index, ends[index])
        if len(ends) < len(handles):
            time.sleep(POLL_SECONDS)
    return [ends[index] for index in range(len(handles))]


def submitit_end(job: Any) -> JobEnd:
    """A job that wrote its result."""
    log = log_of(job)
    outcome, value = job._get_outcome_and_result()
    if outcome == "error":
        last = [line for line in str(value).splitlines() if line.strip()][-1]
        return JobEnd(problem=last, log=log)
    end = end_of(value)
    return JobEnd(problem=end.problem, log=log) if end.problem else end


def log_of(job: Any) -> str:
    """Where a job of submitit wrote its errors."""
    paths = job.paths
    return str(paths.stderr if paths.stderr.exists() else paths.stdout)


def run_by_ray(
    launcher: Any, jobs: Sequence[Sequence[str]], first: int, ended: Ended
) -> list[JobEnd]:
    """Start by Hydra's launcher; where it raises at a failure, wait for the other jobs too."""
    import ray
    from hydra_plugins.hydra_ray_launcher import _core

    references: list[Any] = []
    start = _core.launch_job_on_ray

    told: list[int] = []

    def end(number: int, frame: FrameType | None) -> NoReturn:
        told.append(number)
        raise KeyboardInterrupt  # of other exceptions Ray makes one of its own

    def remember(*arguments: Any) -> Any:
        signal.signal(signal.SIGTERM, end)  # Ray's own, which is there now, aborts this process
        references.append(start(*arguments))
        return references[-1]

    # A task on another node has the environment of the Ray there, not that of the sweep.
    variable = "init.runtime_env.env_vars.PYTHONPATH"
    OmegaConf.update(launcher.ray_cfg, variable, os.environ["PYTHONPATH"], force_add=True)
    ends = []
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        with replaced(_core, "launch_job_on_ray", remember), suppress(ray.exceptions.RayError):
            launcher.launch(jobs, initial_job_idx=first)
        for index, reference in enumerate(references):
            try:
                ends.append(end_of(ray.get(reference)))
            except ray.exceptions.RayError as error:
                first_line = str(error).splitlines()[0]
                ends.append(JobEnd(problem=f"{type(error).__name__}: {first_line}"))
            ended(index, ends[-1])
    except BaseException:  # such as Ctrl-C: the tasks save before a Ray of ours ends with us
        for reference in references:
            ray.cancel(reference)
        if references:
            ray.wait(references, num_returns=len(references), timeout=SAVE_SECONDS)
        if told:
            raise SystemExit(128 + told[0]) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, terminated)
    return ends


def write_results(output: Path) -> None:
    """``results.csv``: one row for every finished run below ``output``."""
    rows = []
    for path in sorted(output.glob("*/result.json")):
        result = read_sealed(path)
        rows.append(
            {
                "run": path.parent.name,
                **result["recipe"],
                "seed": result["seed"],
                "steps": result["steps"],
                "seconds": round(result["seconds"], 1),
                **{f"loss_{name}": loss for name, loss in result["loss"].items()},
                "bits_per_byte": result["bits_per_byte"],
            }
        )
    names = list(dict.fromkeys(name for row in rows for name in row))
    output.mkdir(parents=True, exist_ok=True)
    with (
        replace_file(output / "results.csv") as unfinished,
        unfinished.open("w", newline="") as file,
    ):
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows(rows)
