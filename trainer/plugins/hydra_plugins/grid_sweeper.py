"""Every combination of what is swept, as Hydra's own sweeper, but a sweep that ends well.

A finished run is not started again, a job that fails is named with its reason and its log while the
others go on, ``results.csv`` is written whatever happened, and the exit status says it. Takes the
place of ``hydra/sweeper=basic``, which Hydra chooses where nothing is said.
"""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from trainer.config.schema import TrainConfig
from trainer.run.inputs import run_dir_of
from trainer.run.run_dir import JOB, finished_loss
from trainer.run.sweeps import JobEnd, run_jobs, write_results
from trainer.slurm_jobs import queued_job, record_job

logger = logging.getLogger(__name__)


@dataclass
class GridSweeperConf:
    """``params``: key -> values, beside those of the command line; a batch ends before the next."""

    _target_: str = "hydra_plugins.grid_sweeper.GridSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = None


ConfigStore.instance().store(
    group="hydra/sweeper", name="basic", node=GridSweeperConf, provider="megadocs"
)


class GridSweeper(BasicSweeper):
    """Runs what is missing of a grid and says what became of every job."""

    def sweep(self, arguments: list[str]) -> list[JobEnd]:
        """Returns what became of the jobs, in their order.

        Raises:
            SystemExit: a job failed (status 1); what each failed of is printed.
        """
        assert self.hydra_context is not None
        assert self.config is not None
        assert self.launcher is not None
        try:
            return sweep(self, arguments)
        except (ValueError, OSError) as error:  # what a user can mend: no traceback
            logger.error(error)
            raise SystemExit(1) from None


def sweep(sweeper: GridSweeper, arguments: list[str]) -> list[JobEnd]:
    """Start what is missing, batch after batch; the errors of :meth:`GridSweeper.sweep`."""
    context, config, launcher = sweeper.hydra_context, sweeper.config, sweeper.launcher
    assert context is not None
    assert config is not None
    assert launcher is not None
    loader = context.config_loader
    words = [*sweeper._parse_config(), *arguments]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(words)
    batches = sweeper.split_arguments(parsed, sweeper.max_batch_size)
    jobs = [job for batch in batches for job in batch]
    common = set.intersection(*(set(job) for job in jobs))
    ends: list[JobEnd] = []
    try:
        for batch in batches:
            ends += run_missing(context, config, launcher, batch, len(ends), common)
    finally:
        if isinstance(task_config(context, config, jobs[0]), TrainConfig):
            write_results(Path(config.hydra.sweep.dir))
    failed = [(job, end) for job, end in zip(jobs, ends, strict=True) if end.problem]
    if failed:
        lines = [f"{len(failed)} of {len(jobs)} jobs failed:"]
        for job, end in failed:
            where = f"; see {end.log}" if end.log else ""
            lines.append(f"  {label(job, common)}: {end.problem}{where}")
        lines.append("The same command runs what is missing once that is mended.")
        logger.error("\n".join(lines))
        raise SystemExit(1)
    return ends


def run_missing(
    context: HydraContext,
    config: DictConfig,
    launcher: Launcher,
    batch: Sequence[Sequence[str]],
    first: int,
    common: set[str],
) -> list[JobEnd]:
    """One batch: finished runs are read, the others started."""
    ends: dict[int, JobEnd] = {}
    for index, job in enumerate(batch):
        task = task_config(context, config, job)
        try:
            loss = finished(task)
            record = record_of(task)
            waits = queued_job(record) if record else None
        except (ValueError, OSError) as error:  # no such stream, or another run in the folder
            ends[index] = JobEnd(problem=str(error))
            continue
        if waits and loss is None:
            problem = f"job {waits} of an earlier sweep still has it: wait, or scancel {waits}"
            ends[index] = JobEnd(problem=problem)
            continue
        if loss is not None:
            ends[index] = JobEnd(loss)
            logger.info(f"done   {label(job, common)}: {loss:.4f} (was finished)")
    missing = [index for index in range(len(batch)) if index not in ends]

    def ended(place: int, end: JobEnd) -> None:
        name = label(batch[missing[place]], common)
        if end.problem:
            logger.error(f"FAILED {name}: {end.problem}")
        else:
            logger.info(f"done   {name}" + (f": {end.value:.4f}" if end.value else ""))

    def queued(place: int, job: str) -> None:
        task = task_config(context, config, batch[missing[place]])
        if record := record_of(task):
            record_job(record, job)

    results = run_jobs(launcher, [batch[index] for index in missing], first, ended, queued)
    ends |= dict(zip(missing, results, strict=True))
    return [ends[index] for index in range(len(batch))]


def finished(task: Any) -> float | None:
    """The loss of a run that was trained already."""
    return finished_loss(task) if isinstance(task, TrainConfig) else None


def record_of(task: Any) -> Path | None:
    """Where the job of a run or of a corpus's writer is kept; None where it is not."""
    if isinstance(task, TrainConfig):
        return run_dir_of(task) / JOB
    return task.job_record() if hasattr(task, "job_record") else None


def task_config(context: HydraContext, config: DictConfig, job: Sequence[str]) -> Any:
    """What the program is given in a job."""
    composed = copy.deepcopy(context.config_loader.load_sweep_config(config, list(job)))
    with open_dict(composed):
        del composed["hydra"]
    return OmegaConf.to_object(composed)


def label(job: Sequence[str], common: set[str]) -> str:
    """What is a job's own."""
    own = [one for one in filter_overrides(job) if one not in common]
    return " ".join(own or filter_overrides(job) or ["the only job"])
