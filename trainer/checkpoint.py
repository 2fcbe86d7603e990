"""Atomic checkpoints with ``torch.distributed.checkpoint``.

A checkpoint is a folder ``step-00000120``: written under a temporary name, synced, renamed. A
folder with that name is therefore complete, and a process killed at any moment leaves the previous
one untouched. The order of the data and the random streams are pure functions of the step, so the
step is the whole state beside model and optimiser.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from trainer.averaging import WeightAverage
from trainer.config import Averaging, TrainConfig, load_config
from trainer.distributed import Ranks
from trainer.model import Llama

STEP_FOLDER = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Progress:
    """What a checkpoint knows besides tensors."""

    step: int  # steps done
    plan_hash: str  # order of the data it was trained in
    tokenizer_sha256: str
    seconds: float  # training time so far, over all attempts
    usual_grad_norm: float = 0.0  # the step guard's memory
    accepted_steps: int = 0


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folder = run_dir / "checkpoints"
    return sorted(path for path in folder.glob("step-*") if STEP_FOLDER.fullmatch(path.name))


def save_checkpoint(
    run_dir: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    average: WeightAverage | None,
    progress: Progress,
    ranks: Ranks,
    keep: int,
) -> None:
    """Write the checkpoint of ``progress.step`` and drop all but the newest ``keep``.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    final = run_dir / "checkpoints" / f"step-{progress.step:08d}"
    if final.exists():
        return
    unfinished = final.with_name(f".{final.name}.tmp")
    if ranks.is_main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    ranks.barrier()
    state = training_state(model, optimizers, average)
    try:
        with quiet():
            dcp.save(state, checkpoint_id=unfinished, no_dist=ranks.world_size == 1)
        if ranks.is_main:
            (unfinished / "progress.json").write_text(json.dumps(asdict(progress), indent=1))
            publish(unfinished, final)
    except (OSError, RuntimeError, CheckpointException) as error:
        if ranks.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
        free = shutil.disk_usage(run_dir).free
        older = checkpoints(run_dir)
        raise OSError(
            f"could not write the checkpoint {final}: {last_line(error)} "
            f"({free / 1e9:.2f} GB free on that disk). "
            + (f"{older[-1]} is intact; " if older else "No earlier checkpoint exists; ")
            + "free some space and start the same command again to resume"
        ) from error
    if ranks.is_main:
        for old in checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old)
    ranks.barrier()


def training_state(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], average: WeightAverage | None
) -> dict[str, Any]:
    """Everything with tensors, under names that do not depend on how the model is wrapped."""
    model_state, optimizer_state = get_state_dict(model, optimizers)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    if average is not None:
        state["average"] = average.state
    return state


def publish(unfinished: Path, final: Path) -> None:
    """Sync every file of a folder, then give the folder its final name."""
    for path in (*unfinished.iterdir(), unfinished):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    unfinished.rename(final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def last_line(error: BaseException) -> str:
    """The most specific part of a nested error message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def quiet() -> warnings.catch_warnings:
    """Hide DCP's remark that one process saves alone, which is meant."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def read_progress(checkpoint: Path) -> Progress:
    """Progress stored in one checkpoint folder."""
    return Progress(**json.loads((checkpoint / "progress.json").read_text()))


def load_checkpoint(
    checkpoint: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    average: WeightAverage | None,
    ranks: Ranks,
) -> None:
    """Load everything in place; the number of ranks may differ from when it was saved."""
    state = training_state(model, optimizers, average)
    with quiet():
        dcp.load(state, checkpoint_id=checkpoint, no_dist=ranks.world_size == 1)
    set_state_dict(
        model,
        optimizers,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


def newest_checkpoint(path: str | Path) -> Path:
    """The newest checkpoint of a run folder, or the path itself if it is a checkpoint.

    Raises:
        FileNotFoundError: no complete checkpoint is there.
    """
    checkpoint = Path(path)
    if STEP_FOLDER.fullmatch(checkpoint.name):
        return checkpoint
    found = checkpoints(checkpoint)
    if not found:
        raise FileNotFoundError(
            f"{checkpoint} holds no finished checkpoint (looked for "
            f"{checkpoint}/checkpoints/step-*); train it with train.py first"
        )
    return found[-1]


def load_model(
    path: str | Path, device: torch.device | str = "cpu", compute_dtype: torch.dtype | None = None
) -> tuple[Llama, TrainConfig]:
    """The model of a run folder (its newest checkpoint) or of one checkpoint folder.

    A run that averages its weights gives the average.

    Args:
        path: run folder or ``.../checkpoints/step-00000120``.
        device: where the parameters go.
        compute_dtype: dtype of the activations; default float32 on CPU, bfloat16 on CUDA.

    Raises:
        FileNotFoundError: no complete checkpoint is there.
    """
    checkpoint = newest_checkpoint(path)
    config = load_config(checkpoint.parent.parent / "config.yaml")
    if compute_dtype is None:
        cuda = torch.device(device).type == "cuda"
        compute_dtype = torch.bfloat16 if cuda else torch.float32
    model = Llama(config.model, config.seed, compute_dtype)
    part = "model" if config.optimizer.averaging is Averaging.none else "average"
    state = {part: get_model_state_dict(model)}
    with quiet():
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    model.load_state_dict(state[part])
    return model.to(device).eval(), config
