"""The sweep launcher: jobs side by side, failures apart, finished runs once, one table."""

import csv
import importlib
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import run_script, wait_until
from tests.trainer.conftest import StreamMaker
from tests.warm import Program
from trainer.config.schema import (
    DataConfig,
    ModelConfig,
    RecipeConfig,
    RuntimeConfig,
    TrackingConfig,
    TrainConfig,
)
from trainer.loop import train

SWEEP = [
    "--multirun",
    "hydra/launcher=gpu_pool",
    "experiment=demo",
    "model=tiny",
    "data.context_length=64",
    "recipe.epochs=1",
    "runtime.num_threads=1",
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
    assert done.stdout.count("start  ") == 2
    assert "streams/missing is not a finished stream" in done.stderr

    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert sorted(row["seed"] for row in rows) == ["0", "1"]
    again = run_script("train.py", *options, "data.validation=val")
    assert "start  " not in again.stdout
    assert again.stdout.count("done   ") == 2


@pytest.mark.slow
def test_a_failing_job_of_a_plain_sweep_does_not_end_it(
    make_stream: StreamMaker, tmp_path: Path
) -> None:
    for name in ("real", "val"):
        make_stream(name, [[40, 24]] * 8)
    where = [f"data.root={tmp_path}", f"output={tmp_path / 'runs'}", "data.batch_size=2"]
    plain = [word for word in SWEEP if "launcher" not in word and "epochs" not in word]
    done = run_script("train.py", *plain, *where, "recipe.epochs=1,0.0001,2", check=False)
    assert done.returncode == 1
    assert "1 of 3 jobs failed" in done.stderr
    assert "less than one step" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(list((tmp_path / "runs").glob("*/result.json"))) == 2


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


@pytest.fixture
def plugin() -> Any:
    import train  # noqa: F401  (puts trainer/plugins on sys.path)

    return importlib.import_module("hydra_plugins.gpu_pool_launcher")


def test_jobs_get_the_gpus_this_process_may_use(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    for visible, slots in ((None, [["0", "1"], ["2", "3"]]), ("4,5,6,7", [["4", "5"], ["6", "7"]])):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert list(plugin.GpuPoolLauncher(2, []).slots.queue) == slots


def test_the_pool_takes_no_loss_of_streams_that_were_built_again(
    plugin: Any, make_stream: StreamMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin.GpuPoolLauncher, "start", lambda *_: 0)  # it ends and trains nothing
    for name in ("real", "val"):
        make_stream(name, [[12]] * 4)
    config = TrainConfig(
        data=DataConfig(str(tmp_path), context_length=16, batch_size=2),
        recipe=RecipeConfig(epochs=1),
        model=ModelConfig(16, 32, 1, 2, 1),
        tracking=TrackingConfig(tensorboard=False),
        runtime=RuntimeConfig(num_threads=1),
        output=str(tmp_path / "runs"),
    )
    loss = train(config)
    pool = plugin.GpuPoolLauncher(1, ["cpu"])
    assert pool.train(config, []) == loss
    make_stream("real", [[12]] * 4, shift=1)
    with pytest.raises(RuntimeError, match="ended with status 0 before its result"):
        pool.train(config, [])


@pytest.mark.slow
def test_sigterm_reaches_the_jobs_which_save_and_the_next_start_goes_on(
    corpus_root: Path, tmp_path: Path
) -> None:
    options = [*SWEEP, f"output={tmp_path}", f"data.root={corpus_root}", "recipe.epochs=30"]
    options += ["hydra.launcher.devices=[cpu]", "seed=0,1", "tracking.log_every=1"]
    with Program("train.py", *options) as launcher:
        wait_until(lambda: any(log.stat().st_size for log in tmp_path.glob("*/metrics.jsonl")))
        jobs = psutil.Process(launcher.pid).children()
        launcher.terminate()
        output, errors = launcher.communicate(timeout=60)
        assert not psutil.wait_procs(jobs, timeout=0)[1]
    assert launcher.returncode == 1
    assert output.count("start  ") == 1
    assert "2 of 2 jobs failed" in errors
    assert "stopped at step" in next(tmp_path.glob("*.log")).read_text()
    assert len(list(tmp_path.glob("*/checkpoints/step-*"))) == 1
