"""What Slurm's queue says of the jobs of sweeps, and what a job knows of its own earlier starts."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.files import (
    DamagedFileError,
    damaged,
    optional,
    read_sealed,
    replace_file,
    write_sealed,
)

logger = logging.getLogger(__name__)

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
    write_sealed(path, {"job": job})


def recorded_job(path: Path) -> tuple[str, str] | None:
    """A job that :func:`record_job` kept and Slurm's word for its state, empty where it has none.

    None where no job was recorded, or Slurm does not answer.

    Raises:
        DamagedFileError: the record is damaged.
    """
    if not path.exists():
        return None
    remedy = "look with squeue whether a job still does this work; if none does, delete that file"
    content = read_sealed(path, remedy)
    if "job" not in content:
        raise DamagedFileError(damaged(path, "it names no job", remedy))
    job = str(content["job"])
    states = slurm_states([job])
    return None if states is None else (job, states.get(job, ""))


def queued_job(path: Path) -> str | None:
    """The recorded job, while it waits or runs."""
    found = recorded_job(path)
    return found[0] if found and found[1] not in ENDED else None


def describe_job(path: Path) -> str | None:
    """``queued as job 7``, ``running as job 7`` or ``job 7 was cancelled``.

    None where Slurm knows no such job any more, it ended well, or its record is damaged.
    """
    job, state = optional(path, recorded_job) or ("", "")
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
    starts = earlier_starts(path)
    own = [start["done"] for start in starts if start["job"] == job]
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) >= 2 and own[-2:] == [done, done]:
        return job
    starts.append({"job": job, "done": done, "time": time.time()})
    with replace_file(path) as unfinished:
        unfinished.write_text("".join(json.dumps(start) + "\n" for start in starts))
    return None


def earlier_starts(path: Path) -> list[dict[str, Any]]:
    """What :func:`starts_in_vain` noted; a damaged line is said and left out."""
    starts = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            start = json.loads(line)
            starts.append({key: start[key] for key in ("job", "done", "time")})
        except (ValueError, KeyError, TypeError):
            logger.warning(f"{path} holds a damaged line, {line[:40]!r}; it is left out")
    return starts
