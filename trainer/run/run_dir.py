"""The folder of a run: one config, one process at a time, files that are complete or not there."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from trainer.config.schema import TrainConfig, load_config, save_config
from trainer.data.mds import read_stream_manifest
from trainer.files import only_one, read_sealed, replace_file
from trainer.run.inputs import (
    changed_inputs,
    learnt_hash,
    read_inputs,
    run_dir_of,
    stream_path,
)
from trainer.run.progress import checkpoints
from trainer.slurm_jobs import describe_job, starts_in_vain

JOB = "job.json"  # the Slurm job that a sweep submitted for the run


@contextlib.contextmanager
def claimed(run_dir: Path, config: TrainConfig) -> Iterator[None]:
    """Hold the run folder alone, created or left by an earlier attempt with the same config.

    Raises:
        ValueError: another config was trained there, or another process is training there now.
    """
    with contextlib.ExitStack() as held:
        if not free(run_dir):
            time.sleep(0.5)  # perhaps another's look at it
        try:
            held.enter_context(only_one(run_dir / "run.lock", wait=False))
        except BlockingIOError:
            raise ValueError(trained_elsewhere(run_dir)) from None
        (run_dir / "process.json").write_text(json.dumps(this_process()))
        record_config(run_dir, config)
        yield


def free(run_dir: Path) -> bool:
    """Whether no process trains the run at this moment."""
    if not (run_dir / "run.lock").exists():
        return True
    try:
        with only_one(run_dir / "run.lock", wait=False):
            return True
    except BlockingIOError:
        return False


def state(run_dir: Path) -> str:
    """``finished``, ``diverged``, ``running``, ``queued as job 7``, or where and why cut off."""
    if (run_dir / "result.json").exists():
        return "finished"
    if (run_dir / "diverged.txt").exists():
        return "diverged"
    if not free(run_dir):
        return "running"
    job = describe_job(run_dir / JOB)
    if job is not None and "as job" in job:
        return job
    done = checkpoints(run_dir)
    where = f"after {done[-1].name}" if done else "before its first checkpoint"
    return f"cut off {where}" + (f": {job}" if job else "")


def this_process() -> dict[str, str]:
    """What tells processes that train the same run apart, and jobs of Slurm."""
    job = os.environ.get("SLURM_JOB_ID", "")
    return {"host": socket.gethostname(), "process": str(os.getpid()), "job": job}


def trained_elsewhere(run_dir: Path) -> str:
    """Why a run is not trained twice at once, and what to do."""
    other = {"host": "another host", "process": "?", "job": ""}
    with contextlib.suppress(OSError, ValueError, TypeError):  # it has not written yet who it is
        other |= json.loads((run_dir / "process.json").read_bytes())
    who = f"process {other['process']} on {other['host']}"
    if other["job"] and other["job"] == os.environ.get("SLURM_JOB_ID"):
        return (
            f"{run_dir} is being trained by {who} of this same Slurm job {other['job']}: its "
            "processes do not know of each other, so each would train the whole run. Start them "
            "with srun python train.py (a rank a task), or one torchrun a node "
            "(--ntasks-per-node=1)"
        )
    if other["job"]:
        who += f", Slurm job {other['job']},"
    return (
        f"{run_dir} is being trained by {who} right now; wait for it, choose another name=..., "
        "or start processes that share one run with torchrun"
    )


def check_progress(run_dir: Path, step: int) -> None:
    """Note that this Slurm job starts at ``step``; a job requeued for nothing must end.

    Raises:
        ValueError: its last two starts began at the same step and reached no checkpoint either.
    """
    if job := starts_in_vain(run_dir / "starts.jsonl", step):
        raise ValueError(
            f"two starts in a row of job {job} made no progress past step {step} of {run_dir}: "
            "what ends them comes before the first checkpoint; give the job more time (launcher="
            "slurm: hydra.launcher.timeout_min, signal_delay_s) or save more often "
            "(checkpoint.minutes)"
        )


def finished_loss(config: TrainConfig, inputs: Mapping[str, str] | None = None) -> float | None:
    """The i.i.d. validation loss of a run that has ended; None where it has not.

    Args:
        config: of the run.
        inputs: what it reads; None to look.

    Raises:
        ValueError: the folder holds a run with another config or of other data, or a damaged one.
    """
    inputs = read_inputs(config) if inputs is None else inputs
    run_dir = run_dir_of(config, inputs)
    path = run_dir / "result.json"
    if not path.exists():
        return None
    check_same_config(run_dir, config)
    try:
        result = read_sealed(path)
        loss, read = float(result["loss"]["iid"]), dict(result.get("inputs", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}); delete it and start the same command again: it is "
            "written from the last checkpoint"
        ) from error
    if changed := changed_inputs(read, inputs):
        raise ValueError(
            f"{run_dir} was trained on other data than is there now ({changed}); choose another "
            "name=... or delete that folder"
        )
    if not (run_dir / "config.yaml").exists():
        restore_config(run_dir, config, inputs, result.get("identity"))
    return loss


def restore_config(
    run_dir: Path, config: TrainConfig, inputs: Mapping[str, str], identity: str | None
) -> None:
    """Write the ``config.yaml`` of a finished run that has lost it.

    Args:
        identity: what the result says was learnt; None: an older version wrote it.

    Raises:
        ValueError: that is another experiment, or it is not known which.
    """
    if identity != learnt_hash(config, inputs):
        raise ValueError(
            f"{run_dir} holds a result but no config.yaml, and it is not the result of this config "
            "or does not say of which; choose another name=... or delete that folder"
        )
    stream = stream_path(config, config.recipe.real_stream)
    vocabulary = config.model.vocab_size or read_stream_manifest(stream).vocab_size
    record_config(run_dir, replace(config, model=replace(config.model, vocab_size=vocabulary)))


def check_same_config(run_dir: Path, config: TrainConfig) -> None:
    """Raise ValueError where ``config.yaml`` is that of another experiment."""
    path = run_dir / "config.yaml"
    if not path.exists():
        return
    earlier = load_config(path)
    # A recorded config has the tokenizer's vocabulary; before the streams are open it may be 0.
    vocabulary = config.model.vocab_size or earlier.model.vocab_size
    config = replace(config, model=replace(config.model, vocab_size=vocabulary))
    if earlier.science() != config.science():
        raise ValueError(
            f"{run_dir} holds a run with another config ({differences(earlier, config)}); "
            "choose another name=... or delete that folder"
        )


def record_config(run_dir: Path, config: TrainConfig) -> None:
    """Write ``config.yaml`` after comparing it with that of what was learnt here before.

    What is not learnt, such as where the streams lie, may be another than it was.
    """
    if checkpoints(run_dir) or (run_dir / "result.json").exists():
        check_same_config(run_dir, config)
    with replace_file(run_dir / "config.yaml") as unfinished:
        save_config(config, unfinished)


def differences(earlier: TrainConfig, config: TrainConfig) -> str:
    """What two configs learn differently, as ``key: old -> new``."""

    def flat(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
        """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
        items: dict[str, object] = {}
        for key, value in tree.items():
            if isinstance(value, dict):
                items |= flat(value, f"{prefix}{key}.")
            else:
                items[prefix + key] = value
        return items

    old, new = flat(earlier.science()), flat(config.science())
    return ", ".join(
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in old | new
        if old.get(key) != new.get(key)
    )
