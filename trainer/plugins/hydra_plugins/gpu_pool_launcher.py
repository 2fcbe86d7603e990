"""A Hydra launcher for sweeps on one machine: a job for every free GPU, or for every k GPUs.

    python train.py --multirun hydra/launcher=gpu_pool recipe=real,stitched seed=0,1,2

Every job is a process of its own, so a job that fails or runs out of memory ends alone. SIGTERM
reaches the jobs, which save and end; the same command goes on later.
"""

import copy
import logging
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from trainer.config.schema import TrainConfig
from trainer.run.inputs import run_dir_of
from trainer.run.run_dir import finished_loss

logger = logging.getLogger(__name__)


@dataclass
class GpuPoolConfig:
    """Options of ``hydra.launcher``."""

    _target_: str = "hydra_plugins.gpu_pool_launcher.GpuPoolLauncher"
    gpus_per_job: int = 1  # more than one: the job runs under torchrun
    devices: list[str] = field(
        default_factory=list
    )  # as in CUDA_VISIBLE_DEVICES, such as [0, 1]; empty: all; cpu is a slot too


ConfigStore.instance().store(group="hydra/launcher", name="gpu_pool", node=GpuPoolConfig)


class GpuPoolLauncher(Launcher):
    """Runs the jobs of a sweep as processes, each on devices of its own."""

    def __init__(self, gpus_per_job: int, devices: list[str]) -> None:
        chosen = [str(device) for device in devices] or visible_devices()
        if gpus_per_job < 1 or len(chosen) < gpus_per_job:
            raise ValueError(
                f"hydra.launcher.gpus_per_job={gpus_per_job} does not fit the {len(chosen)} "
                f"devices {chosen}; on a machine without a GPU use "
                "'hydra.launcher.devices=[cpu,cpu]' for two jobs at a time"
            )
        self.children: list[subprocess.Popen[bytes]] = []
        self.stopping = False
        self.one_by_one = threading.Lock()
        self.on_end: Callable[[int, JobReturn], None] = lambda index, done: None
        self.slots: queue.Queue[list[str]] = queue.Queue()
        for first in range(0, len(chosen) - gpus_per_job + 1, gpus_per_job):
            self.slots.put(chosen[first : first + gpus_per_job])

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.context = hydra_context
        self.config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run every job to its end; one that failed holds its error.

        ``on_end`` is called with the place and the return of each as it ends.
        """
        before = signal.signal(signal.SIGTERM, self.stop)
        try:
            with ThreadPoolExecutor(self.slots.qsize()) as pool:
                try:
                    returns = list(pool.map(self.run, range(len(job_overrides)), job_overrides))
                except BaseException:  # such as Ctrl-C: no job may live on alone
                    self.stop()
                    raise
        finally:
            signal.signal(signal.SIGTERM, before)
        return returns

    def run(self, index: int, overrides: Sequence[str]) -> JobReturn:
        """One job from the moment a slot is free until its process has ended."""
        composed = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        done = JobReturn(overrides=list(overrides), cfg=composed, task_name=composed.hydra.job.name)
        try:
            done.return_value = self.train(training_config(composed), overrides)
            done.status = JobStatus.COMPLETED
        except (ValueError, OSError, RuntimeError) as error:
            done.return_value = error
            done.status = JobStatus.FAILED
        with self.one_by_one:
            self.on_end(index, done)
        return done

    def train(self, run: TrainConfig, overrides: Sequence[str]) -> float:
        """Train one run to its end on the next free slot and return its loss."""
        folder = run_dir_of(run)
        log = folder.with_name(f"{folder.name}.log")
        slot = self.slots.get()
        try:
            if self.stopping:
                raise RuntimeError("the sweep was stopped before it began")
            words = " ".join([folder.name, *filter_overrides(overrides)])
            logger.info(f"start  {words} on {','.join(slot)}")
            status = self.start(overrides, log, slot)
        finally:
            self.slots.put(slot)
        loss = finished_loss(run)
        if status or loss is None:
            raise RuntimeError(f"it ended with status {status} before its result; see {log}")
        return loss

    def start(self, overrides: Sequence[str], log: Path, slot: list[str]) -> int:
        """Run the program of this process again for one job and return its exit status."""
        program = [
            str(Path(sys.argv[0]).resolve()),
            *config_flags(sys.argv[1:]),
            *filter_overrides(overrides),
            "hydra.mode=RUN",  # a config that makes every start a sweep must not do so here
        ]
        command = [sys.executable, *program]
        if len(slot) > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone"]
            command = [sys.executable, *torchrun, f"--nproc-per-node={len(slot)}", *program]
        logger.debug(shlex.join(command))
        visible = ",".join(device for device in slot if device != "cpu")
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            child = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
            self.children.append(child)
            if self.stopping:  # stop() may have come between the last two lines
                child.terminate()
            return child.wait()

    def stop(self, *_: object) -> None:
        """End all jobs, which save first, and start no more."""
        self.stopping = True
        for child in self.children:
            child.terminate()


def visible_devices() -> list[str]:
    """The GPUs this process may use, by the names that its own jobs must use for them."""
    import torch  # seconds that --help and a sweep elsewhere need not wait

    count = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return names.split(",")[:count]


def config_flags(arguments: Sequence[str]) -> list[str]:
    """Hydra's flags that say where configs lie; a job needs them as the sweep did."""
    parsed = get_args_parser().parse_args(list(arguments))
    return [
        f"--{name.replace('_', '-')}={value}"
        for name in ("config_path", "config_name", "config_dir")
        if (value := getattr(parsed, name))
    ]


def training_config(composed: DictConfig) -> TrainConfig:
    """The job's config without Hydra's own part."""
    alone = copy.deepcopy(composed)
    with open_dict(alone):
        del alone["hydra"]
    config = OmegaConf.to_object(alone)
    assert isinstance(config, TrainConfig)
    return config
