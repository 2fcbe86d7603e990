"""Atomic checkpoints with ``torch.distributed.checkpoint``.

A checkpoint is a folder ``step-00000120``: written under a temporary name, synced, renamed. A
folder with that name is therefore complete, and a process killed at any moment leaves the previous
one untouched. The order of the data and the random streams are pure functions of the step, so the
step is the whole state beside model and optimiser.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import warnings
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from trainer.config.schema import Averaging, TrainConfig, load_config
from trainer.errors import NonFiniteLossError
from trainer.model.llama import Llama
from trainer.optim.averaging import WeightAverage
from trainer.parallel.ranks import Ranks
from trainer.run.progress import Progress, checkpoints, newest_checkpoint

# One process saves alone, which is meant.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


def wait_for_checkpoint(checkpoint: Path, patience: float = 60.0) -> None:
    """Wait until a checkpoint that another node found can be seen from here.

    Raises:
        FileNotFoundError: it cannot after ``patience`` seconds.
    """
    deadline = time.monotonic() + patience
    while not (checkpoint / "progress.json").exists():
        if time.monotonic() > deadline:
            raise FileNotFoundError(
                f"{checkpoint}, which the first rank sees, is not there on {socket.gethostname()}: "
                "output=... must be a folder that all nodes share"
            )
        time.sleep(0.2)


class Checkpointer:
    """Writes checkpoints while training goes on.

    :meth:`save` copies the tensors and returns; a thread writes them under a temporary name, and
    the next call of any method, on all ranks at the same step, gives a finished folder its name. At
    most one checkpoint is being written.
    """

    def __init__(
        self,
        run_dir: Path,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        average: WeightAverage | None,
        ranks: Ranks,
        keep: int,
    ) -> None:
        self.run_dir = run_dir
        self.parts = (model, optimizers, average)
        self.ranks = ranks
        self.keep = keep
        self.saved = time.monotonic()  # when the last save began
        # Messages of the writing threads must not mix with those of the training.
        self.group: dist.ProcessGroup | None = None
        if ranks.world_size > 1:
            self.group = dist.new_group(backend="gloo")  # type: ignore[assignment]
        self.writing: tuple[Progress, Future[Any]] | None = None
        if ranks.is_main:
            for leftover in (run_dir / "checkpoints").glob(".step-*"):  # of a killed process
                shutil.rmtree(leftover)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Where all ranks stop together, what is being written is still wanted; where one has
        # failed, waiting for it would hang.
        if kind is None or issubclass(kind, NonFiniteLossError):
            self.finish()

    def is_due(self, minutes: float | None) -> bool:
        """Whether the last save began ``minutes`` ago or earlier; never where that is None."""
        return minutes is not None and time.monotonic() - self.saved >= 60 * minutes

    def save(self, progress: Progress) -> None:
        """Begin to write the checkpoint of ``progress.step``, after the one before is on disk."""
        self.finish()
        self.saved = time.monotonic()
        unfinished = self.unfinished(progress)
        if self.ranks.is_main:
            unfinished.mkdir(parents=True)
        self.ranks.barrier()
        future = dcp.async_save(
            training_state(*self.parts),
            checkpoint_id=unfinished,
            process_group=self.group,
            no_dist=self.group is None,
        )
        assert isinstance(future, Future)
        self.writing = (progress, future)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written and drop all but the newest ``keep``.

        Raises:
            OSError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        if self.writing is None:
            return
        progress, future = self.writing
        self.writing = None
        unfinished = self.unfinished(progress)
        try:
            future.result()
            if self.ranks.is_main:
                (unfinished / "progress.json").write_text(json.dumps(asdict(progress), indent=1))
                publish(unfinished, self.folder(progress))
        except (OSError, RuntimeError, CheckpointException) as error:
            if self.ranks.is_main:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(self.explain(progress, error)) from error
        if self.ranks.is_main:
            for old in checkpoints(self.run_dir)[: -self.keep]:
                # Half a folder must not have a checkpoint's name, should a kill come now.
                shutil.rmtree(old.rename(old.with_name(f".{old.name}.old")))

    def publish_if_written(self) -> None:
        """Give a checkpoint its name if all ranks have written it; call it after every step."""
        if self.writing is None:
            return
        if self.ranks.sum_on_hosts(self.writing[1].done()) == self.ranks.world_size:
            self.finish()

    def folder(self, progress: Progress) -> Path:
        return self.run_dir / "checkpoints" / f"step-{progress.step:08d}"

    def unfinished(self, progress: Progress) -> Path:
        folder = self.folder(progress)
        return folder.with_name(f".{folder.name}.tmp")

    def explain(self, progress: Progress, error: BaseException) -> str:
        """What could not be written, what is safe, and what to do."""
        free = shutil.disk_usage(self.run_dir).free
        older = checkpoints(self.run_dir)
        return (
            f"could not write the checkpoint {self.folder(progress)}: {last_line(error)} "
            f"({free / 1e9:.2f} GB free on that disk). "
            + (f"{older[-1]} is intact; " if older else "No earlier checkpoint exists; ")
            + "free some space and start the same command again to resume"
        )


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


def load_checkpoint(
    checkpoint: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    average: WeightAverage | None,
    ranks: Ranks,
) -> None:
    """Load everything in place; the number of ranks may differ from when it was saved."""
    state = training_state(model, optimizers, average)
    dcp.load(state, checkpoint_id=checkpoint, no_dist=ranks.world_size == 1)
    set_state_dict(
        model,
        optimizers,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


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
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    model.load_state_dict(state[part])
    return model.to(device).eval(), config
