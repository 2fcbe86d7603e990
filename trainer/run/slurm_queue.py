"""What Slurm's queue says of jobs."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

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
