"""The sweep launcher: jobs side by side, failures apart, finished runs once, one table."""

import csv
from pathlib import Path

import pytest

from tests.conftest import run_script

SWEEP = [
    "--multirun",
    "hydra/launcher=gpu_pool",
    "experiment=demo",
    "model=tiny",
    "data.context_length=64",
    "recipe.epochs=1",
    "runtime.threads=1",
]


@pytest.mark.slow
def test_a_failing_job_ends_alone_and_a_second_start_runs_only_what_is_missing(
    corpus_root: Path, tmp_path: Path
) -> None:
    own = tmp_path / "conf" / "recipe"  # configs of one's own reach the jobs too
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("name: mine\nepochs: 1\n")
    options = [f"--config-dir={tmp_path / 'conf'}", *SWEEP, f"output={tmp_path}", "recipe=mine"]
    options += ["hydra.launcher.devices=[cpu,cpu]"]
    options += [f"data.root={corpus_root}", "seed=0,1"]
    done = run_script("train.py", *options, "data.validation=val,missing", check=False)
    assert done.returncode == 1
    assert "2 of 4 jobs failed" in done.stderr
    assert done.stdout.count("start  ") == 4
    log = next(path for path in tmp_path.glob("*.log") if "missing" in path.read_text())
    assert str(log.name) in done.stdout

    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert sorted(row["seed"] for row in rows) == ["0", "1"]
    again = run_script("train.py", *options, "data.validation=val")
    assert "start  " not in again.stdout
    assert again.stdout.count("done   ") == 2


def test_more_gpus_a_job_than_there_are(tmp_path: Path) -> None:
    done = run_script(
        "train.py",
        *SWEEP,
        "hydra.launcher.gpus_per_job=2",
        "hydra.launcher.devices=[0]",
        f"output={tmp_path}",
        check=False,
    )
    assert done.returncode == 1
    assert "hydra.launcher.gpus_per_job=2 does not fit" in done.stderr
