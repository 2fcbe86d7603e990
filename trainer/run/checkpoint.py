"""Atomic checkpoints with ``torch.distributed.checkpoint``.

A checkpoint is a folder ``step-00000120``: written under a temporary name, synced, renamed. A
folder with that name is therefore complete, and a process killed at any moment leaves the previous
one untouched. The order of the data and the random streams are pure functions of the step, so the
step is the whole state beside model and optimiser.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import socket
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
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
from trainer.files import DamagedFileError, sha256, write_sealed
from trainer.model.llama import Llama
from trainer.optim.averaging import WeightAverage
from trainer.parallel.ranks import Ranks
from trainer.run.progress import (
    Progress,
    checkpoints,
    damage_of,
    newest_checkpoint,
    require_whole,
)

logger = logging.getLogger(__name__)

FILES = 8  # of a rank in a checkpoint, written and hashed side by side

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
        self.writing: tuple[Progress, Future[dict[str, str]]] | None = None
        self.hasher = ThreadPoolExecutor(1)
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
            storage_writer=dcp.FileSystemWriter(unfinished, thread_count=FILES),
            process_group=self.group,
            no_dist=self.group is None,
        )
        assert isinstance(future, Future)
        self.writing = (progress, self.hasher.submit(self.hash_own_files, future, unfinished))

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
            files = self.own_files(future)
            if self.ranks.is_main:
                write_sealed(unfinished / "progress.json", asdict(replace(progress, files=files)))
                publish(unfinished, self.folder(progress))
        except (OSError, RuntimeError, CheckpointException) as error:
            if self.ranks.is_main:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(self.explain(progress, error)) from error
        if self.ranks.is_main:
            for old in checkpoints(self.run_dir)[: -self.keep]:
                # Half a folder must not have a checkpoint's name, should a kill come now.
                shutil.rmtree(old.rename(old.with_name(f".{old.name}.old")))

    def own_files(self, future: Future[dict[str, str]]) -> dict[str, str]:
        """The hashes of the files of all ranks; raises on all of them where one has failed."""
        own, failed = {}, None
        try:
            own = future.result()
        except (OSError, RuntimeError, CheckpointException) as error:
            failed = error
        parts = self.ranks.gather_on_hosts((own, failed and last_line(failed)))
        if failed is not None:
            raise failed
        for _, problem in parts:
            if problem:
                raise RuntimeError(problem)
        return {name: found for files, _ in parts for name, found in files.items()}

    def hash_own_files(self, written: Future[Any], folder: Path) -> dict[str, str]:
        """SHA-256 of the files of this rank, by name, once they are written."""
        written.result()
        own = f"__{self.ranks.rank}_"
        files = [
            file
            for file in folder.iterdir()
            if file.name.startswith(own) or (self.ranks.is_main and file.name == ".metadata")
        ]
        with ThreadPoolExecutor(FILES) as pool:
            hashes = pool.map(sha256, files)
        return {file.name: found for file, found in zip(files, hashes, strict=True)}

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
    read_tensors(state, checkpoint, ranks.world_size == 1)
    set_state_dict(
        model,
        optimizers,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


def read_tensors(state: dict[str, Any], checkpoint: Path, alone: bool) -> None:
    """Fill ``state`` from a checkpoint.

    Raises:
        DamagedFileError: torch cannot read it.
    """
    try:
        dcp.load(state, checkpoint_id=checkpoint, no_dist=alone)
    except (CheckpointException, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise DamagedFileError(
            f"{checkpoint} cannot be read ({last_line(error)}): delete it, the one before is used "
            "then"
        ) from error


def newest_whole(run_dir: Path, ranks: Ranks) -> Path | None:
    """The newest checkpoint that is not damaged; None where there is none at all.

    A damaged one is named and put aside. All ranks call this together and share the reading.

    Raises:
        DamagedFileError: all are damaged.
    """
    found = ranks.from_main(lambda: checkpoints(run_dir))
    aside: list[Path] = []
    for checkpoint in reversed(found):
        if ranks.world_size > 1:
            wait_for_checkpoint(checkpoint)
        problems = ranks.gather_on_hosts(damage_of(checkpoint, ranks.rank, ranks.world_size))
        if not any(problems):
            if ranks.is_main:
                for damaged in aside:  # its step is written again
                    damaged.rename(damaged.with_name(f"damaged-{damaged.name}"))
            return checkpoint
        if ranks.is_main:
            problem = next(filter(None, problems))
            logger.warning(f"{checkpoint} is damaged ({problem}): the one before it is used")
        aside.append(checkpoint)
    if aside:
        raise DamagedFileError(
            f"no checkpoint of {run_dir} is whole; delete {run_dir / 'checkpoints'} to train from "
            "the start"
        )
    return None


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
    require_whole(checkpoint)
    config = load_config(checkpoint.parent.parent / "config.yaml")
    if compute_dtype is None:
        cuda = torch.device(device).type == "cuda"
        compute_dtype = torch.bfloat16 if cuda else torch.float32
    model = Llama(config.model, config.seed, compute_dtype)
    part = "model" if config.optimizer.averaging is Averaging.none else "average"
    state = {part: get_model_state_dict(model)}
    read_tensors(state, checkpoint, alone=True)
    model.load_state_dict(state[part])
    return model.to(device).eval(), config
