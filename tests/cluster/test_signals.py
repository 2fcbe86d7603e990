"""Jobs that are cut off save, are requeued and go on as if nothing had happened."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from tests.cluster.conftest import LONG, PATIENCE, Start, starts, trains, wait_until
from tests.cluster.slurm import Slurm
from trainer.run.checkpoint import load_model
from trainer.run.progress import checkpoints, read_progress

pytestmark = pytest.mark.timeout(2 * PATIENCE)


def test_a_time_limit_a_requeue_and_a_preemption_cost_no_more_than_a_step(
    start: Start, slurm: Slurm, corpus: str, tmp_path: Path
) -> None:
    words = [*LONG, f"data.root={corpus}", "output=runs", "recipe.epochs=60", "launcher=slurm"]
    sweep = start("train.py", *words, "seed=0,1,2", "name=seed-${seed}")
    runs = [tmp_path / "runs" / f"seed-{seed}" for seed in range(3)]
    wait_until(lambda: all(trains(run) for run in runs))
    job = max(int(name.partition("_")[0]) for name in slurm.jobs())
    slurm.command("scancel", "--signal=USR2", f"{job}_0")  # what submitit's time limit sends
    slurm.command("scontrol", "requeue", f"{job}_1")
    slurm.command("scancel", "--signal=TERM", f"{job}_2")
    said = sweep.wait()
    assert said.count("done   seed=") == 3
    for run in runs:
        first, second = starts(run)
        assert first == 0
        assert second > 0
        assert "two starts" not in said


@pytest.mark.parametrize(
    ("parallel", "number"), [("fsdp", signal.SIGUSR1), ("ddp", signal.SIGTERM)]
)
def test_two_nodes_of_two_tasks_are_one_run_that_a_signal_to_one_rank_stops_whole(
    parallel: str, number: signal.Signals, start: Start, corpus: str, tmp_path: Path
) -> None:
    words = [*LONG, f"data.root={corpus}", "output=runs", "recipe.epochs=8"]
    words += [f"runtime.parallel={parallel}"]
    two_nodes = ["nodes=2", "tasks_per_node=2", "gpus_per_node=2", "cpus_per_task=2"]
    launcher = ["launcher=slurm", *(f"hydra.launcher.{word}" for word in two_nodes)]
    sweep = start("train.py", *launcher, *words, "name=disturbed", "seed=0")
    run = tmp_path / "runs" / "disturbed"
    wait_until(lambda: trains(run))
    rank_of(3, run).send_signal(number)
    sweep.wait()
    assert len(starts(run)) == 2
    assert starts(run)[1] > 0

    tasks = ["srun", "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=2"]
    start("train.py", *words, "name=calm", before=tasks).wait()
    calm = tmp_path / "runs" / "calm"
    assert json.loads((calm / "result.json").read_text())["processes"] == 4
    same = [load_model(checkpoints(path)[-1])[0].state_dict() for path in (run, calm)]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[1])


def test_a_sweep_on_ray_that_is_told_to_stop_cancels_its_tasks_which_save(
    start: Start, corpus: str, tmp_path: Path
) -> None:
    words = [*LONG, f"data.root={corpus}", "output=runs", "recipe.epochs=40", "launcher=ray"]
    words += ["hydra.launcher.ray.init.num_gpus=1", "name=one"]
    run = tmp_path / "runs" / "one"
    log = run / "metrics.jsonl"
    before = ""
    for number in (signal.SIGINT, signal.SIGTERM):
        sweep = start("train.py", *words)
        wait_until(partial(is_longer, log, before))
        sweep.process.send_signal(number)
        sweep.wait(status=128 + number)
        assert log.read_text().startswith(before)
        before = log.read_text()
        assert read_progress(checkpoints(run)[-1]).step == len(before.splitlines())
    start("train.py", *words).wait()
    assert log.read_text().startswith(before)
    assert (run / "result.json").exists()


def is_longer(log: Path, before: str) -> bool:
    return log.exists() and len(log.read_text()) > len(before)


def rank_of(rank: int, run: Path) -> psutil.Process:
    """The process of a rank that trains below the folder of ``run``."""
    for process in psutil.process_iter():
        try:
            mine = process.cwd() == str(run.parents[1]) and "submitit" in " ".join(
                process.cmdline()
            )
            if mine and process.environ().get("SLURM_PROCID") == str(rank):
                return process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    raise AssertionError(f"no process of rank {rank}")
