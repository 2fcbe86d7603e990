"""Metrics: console progress bar, ``metrics.jsonl``, TensorBoard, Weights & Biases, Trackio."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from tqdm import tqdm

from trainer.config.schema import TrackingConfig, TrainConfig, to_dict
from trainer.files import replace_file, write_sealed

logger = logging.getLogger(__name__)

Number = int | float


class Tracker:
    """Writes one run's metrics; a silent twin of it runs on the other ranks."""

    def __init__(
        self, config: TrainConfig, run_dir: Path, total_steps: int, start_step: int, active: bool
    ) -> None:
        self.active = active
        self.writers: list[TensorBoard | RunTracker] = []
        if active:
            self.open(config, run_dir, start_step)
        self.bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            desc=run_dir.name,
            disable=not active,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 15,
        )

    def open(self, config: TrainConfig, run_dir: Path, start_step: int) -> None:
        """Begin to write, after what an earlier attempt wrote up to ``start_step``."""
        forget_after(run_dir / "metrics.jsonl", start_step)
        self.jsonl = (run_dir / "metrics.jsonl").open("a", buffering=1)
        write_sealed(run_dir / "environment.json", environment())
        if config.tracking.tensorboard:
            self.writers.append(TensorBoard(run_dir, start_step))
        for module, project in (
            ("wandb", config.tracking.wandb_project),
            ("trackio", config.tracking.trackio_project),
        ):
            if project:
                self.writers.append(RunTracker(module, project, config, run_dir))

    def log(self, step: int, metrics: Mapping[str, Number]) -> None:
        """Record ``metrics`` after ``step`` steps."""
        if not self.active:
            return
        self.jsonl.write(json.dumps({"step": step, **metrics}) + "\n")
        for writer in list(self.writers):
            try:
                writer.log(step, metrics)
            except Exception as error:  # a service that fails must not cost the training
                self.writers.remove(writer)
                logger.warning(f"{writer.name} failed ({error!r}) and gets no more numbers")

    def show(self, step: int, metrics: Mapping[str, str]) -> None:
        """Move the progress bar to ``step``."""
        self.bar.set_postfix(metrics, refresh=False)
        self.bar.update(step - self.bar.n)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()
        if self.active:
            self.jsonl.close()
        for writer in self.writers:
            with contextlib.suppress(Exception):  # nor its result
                writer.close()


class TensorBoard:
    """Scalars in the run folder; ``tensorboard --logdir runs`` shows all runs."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.name = "TensorBoard"
        # Points from the purged step on are hidden; those of the checkpoint's own step stand.
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)

    def log(self, step: int, metrics: Mapping[str, Number]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class RunTracker:
    """A run of Weights & Biases or of Trackio, which has the same functions.

    A resumed training continues the run of the same name.
    """

    def __init__(self, module: str, project: str, config: TrainConfig, run_dir: Path) -> None:
        self.name = module
        self.library = importlib.import_module(module)
        own = {"id": run_dir.name, "dir": run_dir} if module == "wandb" else {}
        self.library.init(
            project=project, name=run_dir.name, resume="allow", config=to_dict(config), **own
        )

    def log(self, step: int, metrics: Mapping[str, Number]) -> None:
        self.library.log(dict(metrics), step=step)

    def close(self) -> None:
        self.library.finish()


def check_trackers(config: TrackingConfig) -> None:
    """Raise ValueError where the package of a tracker that is asked for is missing."""
    for module, project in (("wandb", config.wandb_project), ("trackio", config.trackio_project)):
        if project and importlib.util.find_spec(module) is None:
            raise ValueError(
                f"tracking.{module}_project={project} needs the {module} package: "
                "pip install 'megadocs[tracking]'"
            )


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of ``metrics.jsonl`` that a resumed run will write again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            done = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # killed in the middle of this line, or damaged
            continue
        if done <= step:
            kept.append(line)
    with replace_file(path) as unfinished:  # a kill must not cost the history
        unfinished.write_bytes(b"".join(line + b"\n" for line in kept))


def was_evaluated(run_dir: Path, step: int) -> bool:
    """Whether ``metrics.jsonl`` holds the evaluation after ``step`` steps."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return any(f'"step": {step}, "eval/'.encode() in line for line in lines)


def environment() -> dict[str, str]:
    """Versions and git state, to repeat the run later."""
    versions = {}
    for name in ("torch", "triton", "numpy", "mosaicml-streaming", "hydra-core"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # Triton: Linux only
            versions[name] = importlib.metadata.version(name)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"python": sys.version.split()[0], "git": git_state(), "device": device, **versions}


def git_state() -> str:
    """The commit of this checkout, marked where it was changed."""
    try:
        describe = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return "git is not installed"
    return describe.stdout.strip() or "not a git checkout"
