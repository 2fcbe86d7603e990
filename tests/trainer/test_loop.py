"""Training end to end: kill and resume bit for bit, two processes, bad input, signals."""

import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gen.exchange.upload import upload
from tests.conftest import ObjectStore, run_script, wait_until
from tests.warm import Program
from trainer.config.schema import (
    AttentionBackend,
    Averaging,
    BadStep,
    CheckpointConfig,
    DataConfig,
    DecaySchedule,
    Mask,
    ModelConfig,
    OptimizerConfig,
    OptimizerKind,
    RecipeConfig,
    RuntimeConfig,
    ScheduleKind,
    TrackingConfig,
    TrainConfig,
)
from trainer.data.mds import MegadocStream
from trainer.errors import NonFiniteLossError
from trainer.evaluation.losses import Scores, evaluate_model
from trainer.loop import train
from trainer.parallel.ranks import Ranks
from trainer.run.checkpoint import load_model
from trainer.run.export import export_run
from trainer.run.inputs import run_dir_of
from trainer.run.kernel_choice import check_kernels
from trainer.run.progress import checkpoints, read_progress
from trainer.run.run_dir import claimed
from trainer.run.trackers import environment
from trainer.stop import Stopped

STITCHED = RecipeConfig("stitched", "real", "stitched", 2, 0.75, 4, 3e-3, 0.4)
ARGUMENTS = [
    "recipe=stitched",
    "recipe.generations=2",
    "recipe.epochs=4",
    "model=tiny",
    "data.context_length=64",
    "data.batch_size=4",
    "data.micro_batch_size=2",
    "data.mask=document",
    "tracking.log_every=1",
    "checkpoint.count=1000",
    "tracking.tensorboard=false",
    "runtime.num_threads=1",
    "name=run",
]


def config(root: Path, output: Path, **changes: object) -> TrainConfig:
    chosen: dict[str, object] = {
        "data": DataConfig(str(root), context_length=64, batch_size=4, mask=Mask.megadoc),
        "recipe": STITCHED,
        "model": ModelConfig(32, 64, 2, 2, 1),
        "tracking": TrackingConfig(tensorboard=False, log_every=1, num_evaluations=2),
        "checkpoint": CheckpointConfig(count=4),
        "runtime": RuntimeConfig(num_threads=1),
        "output": str(output),
    } | changes
    return TrainConfig(**chosen)  # type: ignore[arg-type]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_model(run)[0].state_dict()


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_reports_and_is_not_repeated(corpus_root: Path, tmp_path: Path) -> None:
    settings = config(corpus_root, tmp_path)
    loss = train(settings)
    run = run_dir_of(settings)
    rows = [row for row in metrics(run) if "train/loss" in row]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 1
    result = json.loads((run / "result.json").read_text())
    assert result["loss"]["iid"] == loss == train(settings)  # the second call only reads
    seen = result["tokens_seen"]
    assert rows[-1]["tokens/real"] == seen["real"]
    share = seen["stitched-g2"] / sum(seen.values())
    assert share == pytest.approx(0.75, abs=64 / sum(seen.values()))
    assert result["epochs_seen"]["real"] == pytest.approx(4, abs=0.5)
    assert len(checkpoints(run)) == 2
    assert {"speed/tokens_per_second", "train/grad_norm", "epochs/real"} <= rows[-1].keys()


@pytest.mark.parametrize("mask", list(Mask))
def test_every_mask_trains(corpus_root: Path, tmp_path: Path, mask: Mask) -> None:
    data = DataConfig(str(corpus_root), context_length=32, batch_size=4, mask=mask)
    latent = RecipeConfig("latent", "real", "latent", 2, 0.5, 1, 3e-3, 0.1)
    assert train(config(corpus_root, tmp_path, data=data, recipe=latent)) < 7


@pytest.mark.slow
def test_sigkill_at_random_moments_changes_nothing(corpus_root: Path, tmp_path: Path) -> None:
    common = [*ARGUMENTS, f"data.root={corpus_root}"]
    run_script("train.py", *common, f"output={tmp_path / 'calm'}")
    command = ["train.py", *common, f"output={tmp_path / 'killed'}"]
    run = tmp_path / "killed" / "run"
    for seed in range(2):
        before = len(list((run / "checkpoints").glob("*"))) and checkpoints(run)[-1].name
        with Program(*command) as process:
            deadline = time.monotonic() + 90
            while process.poll() is None and (
                not checkpoints(run) or checkpoints(run)[-1].name == before
            ):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(random.Random(seed).uniform(0.0, 0.3))
            process.kill()
    run_script("train.py", *common, f"output={tmp_path / 'killed'}")
    calm = tmp_path / "calm" / "run"
    disturbed, undisturbed = weights(run), weights(calm)
    assert all(torch.equal(disturbed[name], undisturbed[name]) for name in undisturbed)
    kept = [(row["step"], row["train/loss"]) for row in metrics(run) if "train/loss" in row]
    assert kept == [(r["step"], r["train/loss"]) for r in metrics(calm) if "train/loss" in r]
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_sigterm_saves_and_the_next_start_goes_on(corpus_root: Path, tmp_path: Path) -> None:
    arguments = [*ARGUMENTS, "checkpoint.count=1", f"data.root={corpus_root}"]
    arguments += ["recipe.epochs=12", f"output={tmp_path}"]
    with Program("train.py", *arguments) as process:
        log = tmp_path / "run" / "metrics.jsonl"
        wait_until(lambda: log.exists() and log.stat().st_size > 0)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped at step" in output
    stopped = read_progress(checkpoints(tmp_path / "run")[-1]).step
    assert stopped > 0
    done = run_script("train.py", *arguments)
    assert f"after step {stopped}" in done.stdout


def test_a_loss_that_is_not_finite_names_its_documents(corpus_root: Path, tmp_path: Path) -> None:
    wild = RecipeConfig("real", "real", None, 0, 0.0, 4, 1e30, 0.0)
    settings = config(corpus_root, tmp_path, recipe=wild)
    with pytest.raises(NonFiniteLossError, match=r"step \d+: the loss is nan.*real:"):
        train(settings)


def test_a_gradient_that_is_not_finite_reaches_no_checkpoint(
    corpus_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = TrackingConfig(tensorboard=False, log_every=100)
    saved = CheckpointConfig(count=1000)
    settings = config(corpus_root, tmp_path, tracking=tracking, checkpoint=saved)
    calls = itertools.count()

    def poisoned(parameters: Iterable[torch.nn.Parameter], most: float) -> torch.Tensor:
        first, *rest = parameters
        if next(calls) == 2 and first.grad is not None:
            first.grad[0, 0] = torch.nan
        return torch.nn.utils.clip_grad_norm_([first, *rest], most)

    monkeypatch.setattr("trainer.loop.clip_grad_norm_", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"step 2: the gradient has norm nan.*real:"):
        train(settings)
    assert read_progress(checkpoints(run_dir_of(settings))[-1]).step == 2


def test_a_stop_is_seen_between_log_lines_and_leftovers_are_cleared(
    corpus_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = TrackingConfig(tensorboard=False, log_every=100, num_evaluations=1)
    saved = CheckpointConfig(count=1)
    settings = config(corpus_root, tmp_path, tracking=tracking, checkpoint=saved)
    folder = run_dir_of(settings) / "checkpoints"
    (folder / ".step-00000001.tmp").mkdir(parents=True)  # of a process killed while it wrote
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr(
            "trainer.loop.seed_step",
            lambda seed, step, rank: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None,
        )
        with pytest.raises(Stopped):
            train(settings)
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_last_step_that_ruins_the_model_is_no_result(
    corpus_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scores, "loss", {"iid": math.nan})
    settings = config(corpus_root, tmp_path)
    with pytest.raises(NonFiniteLossError, match="validation loss after the last step is nan"):
        train(settings)
    assert not (run_dir_of(settings) / "result.json").exists()


def test_the_environment_is_known_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "torch" in environment()
    monkeypatch.setenv("PATH", "")
    assert environment()["git"] == "git is not installed"


@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerConfig(
            kind=OptimizerKind.muon,
            weight_decay_schedule=DecaySchedule.linear,
            on_bad_step=BadStep.skip,
            spike_factor=20.0,
        ),
        OptimizerConfig(averaging=Averaging.ema, ema_decay=0.9),
        OptimizerConfig(averaging=Averaging.swa, schedule=ScheduleKind.wsd),
    ],
)
@pytest.mark.slow
def test_every_way_to_optimise_learns_and_resumes_to_the_bit(
    corpus_root: Path, tmp_path: Path, optimizer: OptimizerConfig
) -> None:
    settings = config(
        corpus_root,
        tmp_path,
        optimizer=optimizer,
        tracking=TrackingConfig(tensorboard=False, log_every=1, num_evaluations=1),
        checkpoint=CheckpointConfig(count=4, keep=9),
    )
    loss = train(settings)
    run = run_dir_of(settings)
    rows = [row for row in metrics(run) if "train/loss" in row]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 1
    final = weights(run)
    assert evaluate_run(run, settings) == pytest.approx(loss, abs=1e-6)
    (run / "result.json").unlink()
    for newer in checkpoints(run)[1:]:
        shutil.rmtree(newer)
    assert train(settings) == loss
    assert all(torch.equal(value, final[name]) for name, value in weights(run).items())


@pytest.mark.slow
def test_training_from_a_bucket_is_training_from_the_folder(
    corpus_root: Path, tmp_path: Path, object_store: ObjectStore
) -> None:
    """The corpus is sent there, read as it is needed in a small cache, and exported from there."""
    told = run_script("generate.py", f"root={corpus_root}", "upload=s3://bucket/corpus").stdout
    assert "streams/stitched-g2: 0." in told
    again = upload(corpus_root, "s3://bucket/corpus/")
    assert "streams/stitched-g2: is there already" in again
    here = config(corpus_root, tmp_path / "here")
    there = config(corpus_root, tmp_path / "there")
    there.data.root, there.data.cache = "s3://bucket/corpus", str(tmp_path / "cache")
    there.data.cache_limit = "1mb"
    assert train(there) == train(here)
    run = run_dir_of(there)
    assert run.name == run_dir_of(here).name
    export_run(run, tmp_path / "exported")
    assert (tmp_path / "exported" / "tokenizer.json").exists()
    there.data.cache = None
    with pytest.raises(ValueError, match=r"s3://bucket/corpus/.* is remote: set data\.cache"):
        train(replace(there, seed=1))


def evaluate_run(run: Path, settings: TrainConfig) -> float:
    model, stored = load_model(run)
    stream = MegadocStream(f"{stored.data.root}/streams/val")
    scores = evaluate_model(model, stream, settings.data, Ranks(0, 1, torch.device("cpu")))
    return scores.loss["iid"]


def test_bad_steps_are_skipped_until_there_are_too_many(
    corpus_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = RecipeConfig("real", "real", None, 0, 0.0, 60, 1e30, 0.0)
    skipping = OptimizerConfig(on_bad_step=BadStep.skip)
    settings = config(corpus_root, tmp_path, recipe=wild, optimizer=skipping)
    with pytest.raises(NonFiniteLossError, match=r"step \d+: the gradient has norm nan.*real:"):
        train(settings)
    told = capsys.readouterr()
    assert told.out.count("skipped: step") == 10
    assert "all steps skipped" in told.err
    assert told.err.endswith("\n")  # what is said next does not stand in the progress bar
    rows = [json.loads(line) for line in (run_dir_of(settings) / "metrics.jsonl").open()]
    skipped = [row for row in rows if "train/skipped_steps" in row]
    assert sum(row["train/skipped_steps"] for row in skipped) > 0
    assert all(math.isfinite(value) for row in rows for value in row.values())


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_trackers_get_every_number(
    corpus_root: Path, tmp_path: Path, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip(library)
    tracking = TrackingConfig(tensorboard=False, log_every=1, num_evaluations=1)
    setattr(tracking, f"{library}_project", "p")
    real = RecipeConfig("real", "real", None, 0, 0.0, 1, 3e-3, 0.1)
    saved = CheckpointConfig(count=1)
    settings = config(corpus_root, tmp_path, recipe=real, tracking=tracking, checkpoint=saved)
    train(settings)
    place = run_dir_of(settings) / "wandb" if library == "wandb" else tmp_path / "trackio"
    assert any(path.stat().st_size > 1000 for path in place.rglob("*") if path.is_file())


def test_a_tracker_that_is_not_installed_is_named(
    corpus_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    tracking = TrackingConfig(tensorboard=False, trackio_project="p")
    with pytest.raises(ValueError, match="needs the trackio package: pip install"):
        train(config(corpus_root, tmp_path, tracking=tracking))


def test_another_config_in_the_same_folder_is_refused(corpus_root: Path, tmp_path: Path) -> None:
    settings = config(corpus_root, tmp_path, name="run")
    loss = train(settings)
    for _ in range(2):  # of a finished run, then of one that has stopped
        with pytest.raises(ValueError, match=r"another config \(seed: 0 -> 1\)"):
            train(config(corpus_root, tmp_path, name="run", seed=1))
        assert train(settings) == loss
        (tmp_path / "run" / "result.json").unlink()


def test_one_run_folder_has_one_process(corpus_root: Path, tmp_path: Path) -> None:
    settings = config(corpus_root, tmp_path, name="run")
    with (
        claimed(tmp_path / "run", settings),
        pytest.raises(ValueError, match="is being trained by process"),
    ):
        train(settings)


def test_changed_streams_are_not_resumed(corpus_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    shutil.copytree(corpus_root, root)
    settings = config(root, tmp_path / "runs", name="run")
    train(settings)
    run = tmp_path / "runs" / "run"
    (run / "result.json").unlink()
    shutil.rmtree(root / "streams" / "stitched-g2")
    shutil.copytree(root / "streams" / "simple-g2", root / "streams" / "stitched-g2")
    with pytest.raises(ValueError, match="trained on other data than is there now"):
        train(settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe.generations=64"], "stitched-g64 is not a finished stream"),
        (["recipe.learning_rat=1"], "learning_rat"),
        (["recipe.mixing_fraction=1"], "must be in [0, 1)"),
        (["data.context_length=1"], "data.context_length=1 must be in [2, "),
        (["model.vocab_size=100"], "model.vocab_size=100 is smaller than"),
    ],
)
def test_mistakes_are_one_clear_line(
    corpus_root: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = run_script(
        "train.py",
        *ARGUMENTS,
        f"data.root={corpus_root}",
        f"output={tmp_path}",
        *arguments,
        check=False,
    )
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a full disk needs root")
@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint(corpus_root: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", str(small)], check=False
    )
    if mounted.returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        settings = config(
            corpus_root,
            small,
            tracking=TrackingConfig(tensorboard=False, log_every=1, num_evaluations=1),
            checkpoint=CheckpointConfig(count=50, keep=50),
            name="run",
        )
        with pytest.raises(OSError, match=r"could not write the checkpoint .* is intact"):
            train(settings)
        newest = checkpoints(small / "run")[-1]
        load_model(newest)
        assert not list((small / "run" / "checkpoints").glob(".*"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_backend_that_is_not_deterministic_is_refused_where_that_is_asked_for(
    tmp_path: Path,
) -> None:
    runtime = RuntimeConfig(attention_backend=AttentionBackend.flash, deterministic=True)
    with pytest.raises(ValueError, match=r"flash has other bits in every run and .*gluon_split"):
        check_kernels(config(tmp_path, tmp_path, runtime=runtime), torch.device("cuda"))


def test_a_backend_that_cannot_run_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    runtime = RuntimeConfig(device="cpu", attention_backend=AttentionBackend.gluon)
    with pytest.raises(ValueError, match="backend='gluon' needs float16 or bfloat16 on CUDA"):
        train(config(tmp_path / "nowhere", tmp_path, runtime=runtime))
    runtime = RuntimeConfig(device="cpu", attention_backend=AttentionBackend.cudnn)
    data = DataConfig(root=str(tmp_path / "nowhere"), mask=Mask.document)
    with pytest.raises(ValueError, match="cudnn needs data"):
        train(config(tmp_path, tmp_path, runtime=runtime, data=data))
