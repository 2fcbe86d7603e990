"""Sweeps on a real Slurm and a real Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cluster.conftest import TINY, Start, losses
from tests.cluster.slurm import Slurm
from tests.conftest import wait_until


def test_a_job_that_fails_is_named_and_the_others_go_on(
    start: Start, corpus: str, tmp_path: Path
) -> None:
    words = [*TINY, f"data.root={corpus}", "output=runs", "recipe.epochs=1", "launcher=slurm"]
    said = start("train.py", *words, "seed=0,1", "initial_weights=null,nowhere").wait(status=1)
    assert "2 of 4 jobs failed" in said
    assert "seed=1 initial_weights=nowhere: " in said
    log = next(word for word in said.split() if word.startswith(str(tmp_path)))
    assert "nowhere" in Path(log).read_text()
    assert len(losses(tmp_path / "runs")) == 2
    again = start("train.py", *words, "seed=0,1").wait()
    assert again.count("was finished") == 2


@pytest.mark.parametrize(
    "launcher",
    [["hydra/launcher=submitit_slurm"], ["launcher=ray", "hydra.launcher.ray.init.num_gpus=1"]],
)
def test_launchers_as_they_are(
    launcher: list[str], start: Start, corpus: str, tmp_path: Path
) -> None:
    words = [*TINY, f"data.root={corpus}", "output=runs", "recipe.epochs=1"]
    start("train.py", "--multirun", *launcher, *words, "seed=0").wait()
    assert len(losses(tmp_path / "runs")) == 1


def test_a_sweep_that_was_left_is_not_submitted_twice(
    start: Start, slurm: Slurm, corpus: str, tmp_path: Path
) -> None:
    words = [*TINY, f"data.root={corpus}", "output=runs", "recipe.epochs=1", "launcher=slurm"]
    words += ["seed=0,1", "name=seed-${seed}", "+hydra.launcher.additional_parameters.hold=true"]
    left = start("train.py", *words)
    runs = [tmp_path / "runs" / f"seed-{seed}" for seed in range(2)]
    wait_until(lambda: all((run / "job.json").exists() for run in runs))
    left.process.kill()
    said = start("train.py", *words).wait(status=1)
    job = json.loads((runs[0] / "job.json").read_text())["job"]
    assert f"job {job} of an earlier sweep still has it: wait, or scancel {job}" in said
    slurm.command("scancel", "--user=root")
    said = start("train.py", *words[:-1]).wait()
    assert said.count("done   seed=") == 2
