"""One run on all tasks of ``srun python train.py ...`` or of a submitit job, without torchrun."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

FIRST_PORT, PORTS = 20_000, 40_000


def ranks_of_step(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would set for this process, from Slurm's variables of its job step.

    Empty where a torchrun has set it, and outside a step of several tasks. ``MASTER_ADDR`` and
    ``MASTER_PORT`` stay where they are set.

    Raises:
        ValueError: the head node's address cannot be found.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" in environment or tasks == "1":
        return {}
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    port = FIRST_PORT + (97 * job + step) % PORTS  # neighbours on a node get different ones
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or head_address(environment),
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
    }


def head_address(environment: Mapping[str, str]) -> str:
    """Address of the step's first node, as Slurm itself reaches it: names need not resolve."""
    if environment.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return "127.0.0.1"
    try:
        nodes = scontrol("show", "hostnames", environment["SLURM_STEP_NODELIST"]).split()
        words = scontrol("--oneliner", "show", "node", nodes[0]).split()
        return next(word for word in words if word.startswith("NodeAddr=")).partition("=")[2]
    except (OSError, subprocess.SubprocessError, StopIteration) as error:
        raise ValueError(
            f"cannot ask Slurm for the address of the first node ({error}); "
            "export MASTER_ADDR=<that node's address> before srun"
        ) from None


def scontrol(*words: str) -> str:
    done = subprocess.run(
        ["scontrol", *words], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def own_device_only() -> bool:
    """Whether Slurm shows each task no device but its own (``--gpus-per-task``)."""
    return "SLURM_GPUS_PER_TASK" in os.environ
