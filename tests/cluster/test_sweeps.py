"""Sweeps on a real Slurm and a real Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.conftest import TINY, Start, losses


def test_a_job_that_fails_is_named_and_the_others_go_on(
    start: Start, corpus: str, tmp_path: Path
) -> None:
    words = [*TINY, f"data.root={corpus}", "output=runs", "recipe.epochs=1", "launcher=slurm"]
    said = start("train.py", *words, "seed=0,1", "data.validation=val,missing").wait(status=1)
    assert "2 of 4 jobs failed" in said
    assert "seed=1 data.validation=missing: " in said
    log = next(word for word in said.split() if word.startswith(str(tmp_path)))
    assert "missing" in Path(log).read_text()
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
