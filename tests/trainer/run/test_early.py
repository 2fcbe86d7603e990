"""What cannot work ends in one line before the model is built, and leaves nothing behind."""

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainer.conftest import write_stream
from trainer import loop, setup
from trainer.config.schema import TrainConfig
from trainer.evaluation.losses import evaluate_model
from trainer.loop import train
from trainer.run.inputs import run_dir_of
from trainer.run.progress import checkpoints
from trainer.run.trackers import TensorBoard
from trainer.stop import Stopped

BASE = {
    "data": {"context_length": 16, "batch_size": 2},
    "recipe": {"epochs": 2},
    "model": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 1,
    },
    "runtime": {"num_threads": 1},
    "tracking": {"tensorboard": False, "num_evaluations": 2, "log_every": 1},
    "checkpoint": {"count": 1},
}
Configure = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny streams."""
    root = tmp_path_factory.mktemp("corpus")
    write_stream(root / "streams" / "real", [[12]] * 8)
    write_stream(root / "streams" / "val", [[12]] * 4, shift=5)
    write_stream(root / "streams" / "simple-g1", [[12]] * 8, shift=7)
    return root


@pytest.fixture
def configured(corpus: Path, tmp_path: Path) -> Configure:
    """A tiny run with some keys changed."""

    def configure(**changes: Any) -> TrainConfig:
        config = OmegaConf.merge(OmegaConf.structured(TrainConfig), BASE)
        config.data.root, config.output = str(corpus), str(tmp_path / "runs")
        for key, value in changes.items():
            OmegaConf.update(config, key, value)
        run = OmegaConf.to_object(config)
        assert isinstance(run, TrainConfig)
        return run

    return configure


NUMBERS: dict[str, list[Any]] = {
    "data.context_length": [-1, 0, 1, 10**9],
    "data.batch_size": [-1, 0, 10**12],
    "data.micro_batch_size": [-1, 0, 3, 10**12],
    "data.order_seed": [-1, 10**25],
    "recipe.epochs": [math.nan, math.inf, -1.0, 0.0, 1e30, 1e-9],
    "recipe.learning_rate": [math.nan, math.inf, -1.0, 0.0],
    "recipe.weight_decay": [math.nan, math.inf, -1.0],
    "recipe.mixing_fraction": [math.nan, -1.0, 0.5, 1.0, math.inf],
    "model.hidden_size": [-2, 0, 1, 17, 10**9],
    "model.intermediate_size": [-1, 0, 10**12],
    "model.num_layers": [-1, 0, 10**9],
    "model.num_heads": [-1, 0, 3, 10**9],
    "model.num_kv_heads": [-1, 0, 3],
    "model.vocab_size": [-1, 5, 5 * 10**9],
    "model.rope_theta": [math.nan, math.inf, 0.0, -1.0, 1e30],
    "model.norm_eps": [math.nan, math.inf, 0.0, -1.0, 1e30],
    "model.init_std": [math.nan, math.inf, 0.0, -1.0, 1e30],
    "model.dropout": [math.nan, 1.0, -0.1],
    "optimizer.beta1": [math.nan, 1.0, -1.0],
    "optimizer.beta2": [math.nan, 1.0, -1.0],
    "optimizer.eps": [math.nan, math.inf, 0.0, -1.0],
    "optimizer.max_grad_norm": [math.nan, math.inf, 0.0, -1.0],
    "optimizer.warmup_fraction": [math.nan, -1.0, 2.0],
    "optimizer.min_lr_ratio": [math.nan, -1.0, 2.0],
    "optimizer.ema_decay": [math.nan, 0.0, 2.0],
    "optimizer.swa_fraction": [math.nan, 0.0, 2.0],
    "optimizer.spike_factor": [math.nan, 1.0, -1.0],
    "distillation.alpha": [math.nan, 0.0, 2.0],
    "runtime.num_threads": [-1, 0, 100_000],
    "runtime.context_parallel": [-1, 0, 3],
    "runtime.shard_size": [-1, 0, 2],
    "tracking.log_every": [-1, 0],
    "tracking.num_evaluations": [-1, 0],
    "checkpoint.count": [-1, 0],
    "checkpoint.keep": [-1, 0],
    "checkpoint.minutes": [math.nan, -1.0, 0.0],
    "seed": [-1, 10**25],
}
TEXTS: dict[str, list[Any]] = {
    "name": ["", ".", "..", "../x", "a/b"],
    "output": ["", "/proc/none", "/dev/null", "s3://bucket/runs", "file:///tmp/runs"],
    "data.root": ["", "nosuch", "/dev/null", "file:///tmp/corpus"],
    "data.cache": ["s3://bucket/cache"],
    "data.validation": ["", "nosuch", "../x"],
    "recipe.real_stream": ["nosuch", "../x"],
    "runtime.attention_backend": ["gluon", "cudnn"],
    "runtime.device": ["", "cuda:0", "meta", "mps", "nosuch"],
    "initial_weights": ["", "nosuch", "/dev/null", "hf://llama"],
    "distillation.teachers": [["nosuch"], [""], ["/dev/null"], ["gs://bucket/runs/a"]],
    "tracking.wandb_project": ["p"],
}
ODD = [
    (key, value) for table in (NUMBERS, TEXTS) for key, values in table.items() for value in values
]


def test_there_are_enough_odd_configs() -> None:
    assert len(ODD) >= 150


@pytest.mark.parametrize(("key", "value"), ODD)
def test_an_odd_config_gives_one_line_and_leaves_nothing(
    key: str, value: Any, configured: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "Llama", lambda *_: pytest.fail("the model was built"))
    if key == "tracking.wandb_project":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises((ValueError, OSError)) as caught:
        train(configured(**{key: value}))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    shown = str(value) if not isinstance(value, list) else str(value[0])
    assert key.rpartition(".")[2] in message or shown in message
    assert not (tmp_path / "runs").exists()


def test_a_share_that_leaves_the_real_stream_next_to_nothing_is_refused(
    configured: Configure, tmp_path: Path
) -> None:
    mixed = {"recipe.stream": "simple", "recipe.generations": 1}
    config = configured(**mixed, **{"recipe.mixing_fraction": 0.9999999})
    with pytest.raises(
        ValueError, match=r"mixing_fraction=0\.9999999 reads simple-g1 [12]\d,\d{3},\d{3} "
    ):
        train(config)
    assert not (tmp_path / "runs").exists()


def test_a_run_is_no_folder_to_start_from_and_says_how_it_becomes_one(
    configured: Configure,
) -> None:
    config = configured()
    train(config)
    run = run_dir_of(config)
    with pytest.raises(FileNotFoundError, match=rf"evaluate\.py runs=\[{run}\] export=FOLDER"):
        train(configured(initial_weights=str(run)))


def test_what_ended_a_run_before_its_first_checkpoint_may_be_mended_under_its_name(
    configured: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: object) -> None:
        raise ValueError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(setup, "Llama", too_large)
        with pytest.raises(ValueError, match="out of memory"):
            train(configured(name="mine"))
    assert math.isfinite(train(configured(name="mine", **{"data.batch_size": 4})))


def test_a_due_checkpoint_is_on_disk_before_a_due_evaluation(
    configured: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(**{"checkpoint.count": 2, "tracking.num_evaluations": 2})
    seen: list[list[str]] = []

    def looking(*arguments: Any) -> Any:
        seen.append([path.name for path in checkpoints(run_dir_of(config))])
        return evaluate_model(*arguments)

    monkeypatch.setattr(loop, "evaluate_model", looking)
    train(config)
    (half, whole) = seen
    assert len(half) == 1
    assert half < whole


def test_a_stop_skips_the_evaluation_which_the_next_start_makes_up_for(
    configured: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = configured(name="calm")
    loss = train(calm)
    steps = json.loads((tmp_path / "runs/calm/result.json").read_text())["steps"]
    config = configured(name="stopped")
    backward, taken = loop.accumulate_gradients, []

    def stopping(*arguments: Any) -> Any:
        taken.append(1)
        if len(taken) == math.ceil(steps / 2):  # in the step after which an evaluation is due
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "accumulate_gradients", stopping)
        patched.setattr(loop, "evaluate_model", lambda *_: pytest.fail("evaluated"))
        with pytest.raises(Stopped):
            train(config)
    assert train(config) == loss
    evaluated = [
        [
            (row["step"], row["eval/iid"])
            for row in map(json.loads, (tmp_path / "runs" / name / "metrics.jsonl").open())
            if "eval/iid" in row
        ]
        for name in ("calm", "stopped")
    ]
    assert evaluated[0] == evaluated[1]


def test_a_tracker_that_fails_does_not_cost_the_run(
    configured: Configure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(TensorBoard, "log", failing)
    assert math.isfinite(train(configured(**{"tracking.tensorboard": True})))
    assert capsys.readouterr().err.count("TensorBoard failed (OSError('no route to host'))") == 1


def test_tensorboard_keeps_the_points_of_the_step_that_is_resumed_from(tmp_path: Path) -> None:
    for start, steps in ((0, (6, 12)), (6, (12, 18))):  # killed after 12, its checkpoint is of 6
        tensorboard = TensorBoard(tmp_path, start)
        for step in steps:
            tensorboard.log(step, {"eval/iid": 1.0})
        tensorboard.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [point.step for point in events.Scalars("eval/iid")] == [6, 12, 18]


def test_remarks_about_the_data(configured: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    train(configured(**{"data.batch_size": 5, "recipe.epochs": 1, "data.validation": "real"}))
    told = capsys.readouterr()
    assert "real: 1 epochs asked, 0.62 read in 1 steps: the last, partial batch is left" in told.out
    assert "data.batch_size=4 reads 1.00" in told.out
    assert "warning: data.validation=real is the training stream real" in told.err
    config = configured(**{"recipe.real_stream": "val"})
    train(config)
    assert "warning: data.validation=val is the training stream val" in capsys.readouterr().err
