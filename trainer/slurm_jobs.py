"""What Slurm's queue says of the jobs of sweeps, and what a job knows of its own earlier starts."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from trainer.files import write_json

ENDED = {  # Slurm's final states, and what they say of a job without a result
    "COMPLETED": "ended without a result",
    "FAILED": "its process failed",
    "TIMEOUT": "reached its time limit",
    "CANCELLED": "was cancelled",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "ran out of memory",
    "BOOT_FAIL": "its node did not start",
    "DEADLINE": "missed its deadline",
    "PREEMPTED": "was preempted and not requeued",
    "": "has left Slurm's queue without a result",
}


def slurm_states(jobs: Sequence[str]) -> dict[str, str] | None:
    """State of each job that Slurm still knows, ended ones for some minutes; None without Slurm.

    ``squeue`` needs no accounting database, which ``sacct`` does.
    """
    names = ",".join(dict.fromkeys(job.partition("_")[0] for job in jobs))
    command = ["squeue", "--states=all", "--noheader", "--array", "--format=%i|%T", "--jobs", names]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    if done.returncode and "Invalid job id" not in done.stderr:
        return None  # the controller does not answer: nothing is known
    return dict(line.split("|", 1) for line in done.stdout.split() if "|" in line)


def record_job(path: Path, job: str) -> None:
    """Keep the id of the job that was submitted for the work that ``path`` stands for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"job": job})


def recorded_job(path: Path) -> tuple[str, str] | None:
    """A job that :func:`record_job` kept and Slurm's word for its state, empty where it has none.

    None where no job was recorded, or Slurm does not answer.
    """
    if not path.exists():
        return None
    job = str(json.loads(path.read_text())["job"])
    states = slurm_states([job])
    return None if states is None else (job, states.get(job, ""))


def queued_job(path: Path) -> str | None:
    """The recorded job, while it waits or runs."""
    found = recorded_job(path)
    return found[0] if found and found[1] not in ENDED else None


def describe_job(path: Path) -> str | None:
    """``queued as job 7``, ``running as job 7`` or ``job 7 was cancelled``.

    None where Slurm knows no such job any more, or it ended well.
    """
    job, state = recorded_job(path) or ("", "")
    if state in ("", "COMPLETED"):
        return None
    if state in ENDED:
        return f"job {job} {ENDED[state]}"
    return f"{'queued' if state in ('PENDING', 'REQUEUED') else 'running'} as job {job}"


def starts_in_vain(path: Path, done: int) -> str | None:
    """Note in ``path`` that this Slurm job starts where ``done`` is done.

    Returns:
        The job's id where it was requeued and its last two starts began there as well: then nothing
        is noted, and it must end. Else None.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    lines = path.read_text().splitlines() if path.exists() else []
    starts = [start["done"] for start in map(json.loads, lines) if start["job"] == job]
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) >= 2 and starts[-2:] == [done, done]:
        return job
    with path.open("a") as file:
        file.write(json.dumps({"job": job, "done": done, "time": time.time()}) + "\n")
    return None
