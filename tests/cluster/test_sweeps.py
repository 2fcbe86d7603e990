"""Sweeps on a real Slurm and a real Ray."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import LONG, PATIENCE, TINY, Start, losses, starts, trains, wait_until
from tests.cluster.slurm import Slurm
from tests.conftest import REPOSITORY
from tests.test_wheel import Environment, build_wheel, call

pytestmark = pytest.mark.timeout(2 * PATIENCE)


def test_a_job_that_fails_is_named_and_the_others_go_on(
    start: Start, corpus: str, tmp_path: Path
) -> None:
    words = [*TINY, f"data.root={corpus}", "output=runs", "launcher=slurm", "seed=0,1"]
    said = start("train.py", *words, "recipe.epochs=1,0.0001").wait(status=1)
    assert "2 of 4 jobs failed" in said
    assert "seed=1 recipe.epochs=0.0001: " in said
    log = next(word for word in said.split() if word.startswith(str(tmp_path)))
    assert "less than one step" in Path(log).read_text()
    assert len(losses(tmp_path / "runs")) == 2
    again = start("train.py", *words, "recipe.epochs=1").wait()
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
    told = start("report.py", "runs=runs").wait(status=1)
    for run in runs:
        assert f"{run.name} (queued as job {job_of(run)})" in told
    said = start("train.py", *words).wait(status=1)
    job = json.loads((runs[0] / "job.json").read_text())["job"]
    assert f"job {job} of an earlier sweep still has it: wait, or scancel {job}" in said
    slurm.command("scancel", "--user=root")
    said = start("train.py", *words[:-1]).wait()
    assert said.count("done   seed=") == 2


def test_a_sweep_goes_on_after_everything_was_cancelled(
    start: Start, slurm: Slurm, corpus: str, tmp_path: Path
) -> None:
    words = [*LONG, f"data.root={corpus}", "output=runs", "recipe.epochs=60", "launcher=slurm"]
    words += ["seed=0,1", "name=seed-${seed}"]
    sweep = start("train.py", *words)
    runs = [tmp_path / "runs" / f"seed-{seed}" for seed in range(2)]
    wait_until(lambda: all(trains(run) for run in runs))
    told = start("report.py", "runs=runs").wait(status=1)
    assert "seed-0 (running), seed-1 (running)" in told
    slurm.command("scancel", "--user=root")
    said = sweep.wait(status=1)
    assert "2 of 2 jobs failed" in said
    told = start("report.py", "runs=runs").wait(status=1)
    for run in runs:
        why = f"job {job_of(run)} was cancelled"
        assert f"{run.name.replace('-', '=')}: {why}; see " in said
        assert re.search(rf"{run.name} \(cut off after step-\d+: {why}\)", told)
    said = start("train.py", *words).wait()
    assert said.count("done   seed=") == 2
    for run in runs:
        first, second = starts(run)
        assert first == 0
        assert second > 0
    assert "seed" in start("report.py", "runs=runs").wait()


def test_a_star_search_goes_on_from_a_job_that_was_cancelled(
    start: Start, slurm: Slurm, corpus: str, tmp_path: Path
) -> None:
    words = [*LONG, f"data.root={corpus}", "output=runs", "sweep=star_real", "launcher=slurm"]
    words += ["name=epochs-${recipe.epochs}", "recipe.epochs=1,60"]
    words += ["recipe.learning_rate=choice(0.003)", "recipe.weight_decay=choice(0.1)"]
    search = start("train.py", *words)
    short, long = (tmp_path / "runs" / f"epochs-{epochs}" for epochs in ("1.0", "60.0"))
    wait_until(lambda: trains(long) and (short / "result.json").exists())
    slurm.command("scancel", job_of(long))
    said = search.wait(status=1)
    assert "1 of 2 runs failed" in said
    assert f"job {job_of(long)} was cancelled" in said
    assert len(losses(tmp_path / "runs")) == 1
    said = start("train.py", *words).wait()
    assert "2 runs wanted, 1 of them finished already" in said
    assert "optimum after 2 runs and " in said
    first, second = starts(long)
    assert first == 0
    assert second > 0


STUDY = """\
# @package _global_
defaults:
  - override /hydra/sweeper: study
hydra:
  mode: MULTIRUN
  sweeper:
    question: long_against_short
    arms:
      long:
        overrides: [recipe=real, data.context_length=64, data.batch_size=2]
      short:
        overrides: [recipe=real, data.context_length=32, data.batch_size=4]
    reference: short
    seeds: [1]
    common: ["evaluation.context_lengths=[64]", "evaluation.masks=[megadoc]"]
    tuning:
      sizes: [1.0]
      runs: 1
      grid:
        recipe.epochs: choice(1)
"""


def test_a_study_by_submitit(start: Start, corpus: str, tmp_path: Path) -> None:
    (tmp_path / "conf" / "study").mkdir(parents=True)
    (tmp_path / "conf" / "study" / "contexts.yaml").write_text(STUDY)
    own = {"data.context_length", "experiment"}  # the arms have theirs
    words = [word for word in TINY if word.partition("=")[0] not in own]
    words += [f"data.root={corpus}", "output=runs", "launcher=slurm", "tracking.num_evaluations=1"]
    words = ["--config-dir=conf", "-m", "study=contexts", *words]
    said = start("train.py", *words).wait()
    assert "Not known yet: with one seed long differs from short by " in said
    assert len(losses(tmp_path / "runs")) == 4  # a search and a final run of each arm


def test_a_folder_that_a_node_sees_late(
    start: Start, slurm: Slurm, streams: Path, tmp_path: Path
) -> None:
    shared, away = tmp_path / "shared", tmp_path / "away"
    shared.mkdir()
    (shared / "data").symlink_to(streams)
    words = [*TINY, "data.root=data", "output=runs", "recipe.epochs=1", "launcher=slurm"]
    words += ["name=one", f"hydra.launcher.submitit_folder={tmp_path}/submitit/%j"]
    words += ["+hydra.launcher.additional_parameters.hold=true"]
    sweep = start("train.py", *words, folder=shared)
    wait_until(lambda: (shared / "runs" / "one" / "job.json").exists())
    job = job_of(shared / "runs" / "one")
    shared.rename(away)
    slurm.command("scontrol", "release", job)
    wait_until(lambda: slurm.jobs()[job] == "RUNNING")
    time.sleep(15)  # longer than a job needs to begin, and it has nothing to begin with
    assert slurm.jobs()[job] == "RUNNING"
    away.rename(shared)
    sweep.wait()
    assert (shared / "runs" / "one" / "result.json").exists()


@pytest.mark.parametrize("how", ["wheel", "editable"])
def test_what_is_installed_runs_from_an_empty_folder(
    how: str, slurm: Slurm, streams: Path, tmp_path: Path
) -> None:
    """Data and output by relative paths; nothing but the command is known to the jobs."""
    environment = Environment(tmp_path / "venv")
    if how == "wheel":
        environment.pip("install", "--no-deps", build_wheel(tmp_path))
    else:
        environment.pip("install", "--no-deps", "--no-build-isolation", "--editable", REPOSITORY)
    (tmp_path / "corpus").symlink_to(streams)
    work = tmp_path / "empty"
    work.mkdir()
    words = [*TINY, "data.root=../corpus", "output=../runs", "recipe.epochs=1", "launcher=slurm"]
    megadocs = environment.folder / "bin" / "megadocs"
    conf = slurm.environment["SLURM_CONF"]
    said = call(megadocs, "train", "--multirun", *words, "seed=0,1", cwd=work, SLURM_CONF=conf)
    assert said.count("done   seed=") == 2
    assert len(losses(tmp_path / "runs")) == 2
    assert not list(work.iterdir())


def job_of(run: Path) -> str:
    """The Slurm job that a sweep submitted for a run."""
    return str(json.loads((run / "job.json").read_text())["job"])
