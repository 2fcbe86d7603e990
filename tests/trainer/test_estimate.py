"""What a run will cost: its own plan's steps and pairs, memory, and hours at a stated MFU."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import run_script
from tests.trainer.conftest import StreamMaker
from trainer import estimate as module
from trainer.config.estimate import DEVICES, TrainEstimate
from trainer.config.schema import (
    ActivationCheckpointing,
    DataConfig,
    Mask,
    ModelConfig,
    Parallel,
    RecipeConfig,
    RuntimeConfig,
    TrainConfig,
)
from trainer.estimate import chosen_mfu, estimate, report
from trainer.parallel.activation_checkpointing import step_bytes

M300 = ModelConfig(768, 2688, 12, 12, 12)


@pytest.fixture
def run(make_stream: StreamMaker, tmp_path: Path) -> TrainConfig:
    """100 documents of 50 tokens, in windows of 100: two in each."""
    make_stream("real", [[50]] * 100)
    make_stream("val", [[50]])
    return TrainConfig(
        data=DataConfig(str(tmp_path), context_length=100, batch_size=10, mask=Mask.megadoc),
        recipe=RecipeConfig(epochs=4),
        model=M300,
        estimate=TrainEstimate(mfu=0.5),
    )


def test_flops_tokens_and_hours_are_those_of_the_plan(run: TrainConfig) -> None:
    found = estimate(run)
    model = replace(M300, vocab_size=97)
    assert found.parameters == model.parameter_count()
    assert found.steps == 4 * 50 // 10
    assert found.tokens == found.steps * 1000
    matrices = 12 * (4 * 768 * 768 + 3 * 768 * 2688) + 97 * 768
    pairs = 20 * 50 * 51 // 2  # 20 documents a step
    assert found.flops == found.steps * (6 * matrices * 1000 + 12 * 12 * 768 * pairs)
    hours = found.flops / (989e12 * 0.5) / 3600
    assert found.gpu_hours == pytest.approx(hours)
    assert found.mode == "none"
    assert "at 50% MFU (estimate.mfu)" in str(found)
    whole = replace(run, data=replace(run.data, mask=Mask.none))
    assert estimate(whole).flops > found.flops


@pytest.mark.slow
def test_what_is_computed_again_is_what_fits(run: TrainConfig) -> None:
    data = replace(run.data, context_length=100_000, batch_size=1)
    long = replace(run, data=data, recipe=RecipeConfig(epochs=400))
    on_large = estimate(replace(long, estimate=TrainEstimate(device="h200-141gb", mfu=0.5)))
    on_small = estimate(replace(long, estimate=TrainEstimate(device="rtx4090-24gb", mfu=0.5)))
    assert on_large.mode == "none"
    assert on_small.mode in ("selective", "full", None)
    filled = replace(long, model=replace(M300, vocab_size=97))
    for mode, size in on_small.memory.items():
        assert size == step_bytes(filled, 100_000, 1, ActivationCheckpointing(mode))
    assert on_small.gpu_hours > on_large.gpu_hours * DEVICES["h200-141gb"][1] / 165e12
    tiny = replace(long, data=replace(data, context_length=2_000_000))
    nothing = replace(tiny, recipe=RecipeConfig(epochs=4000), estimate=TrainEstimate(mfu=0.5))
    assert "does not fit: try a smaller" in str(estimate(nothing))


def test_gpus_share_windows_states_and_hours(run: TrainConfig) -> None:
    alone = estimate(run)
    five = estimate(replace(run, estimate=TrainEstimate(num_gpus=5, mfu=0.5)))
    assert five.gpu_hours == alone.gpu_hours
    assert five.memory["none"] < alone.memory["none"]
    sharded = replace(run, runtime=RuntimeConfig(parallel=Parallel.fsdp))
    sharded = replace(sharded, estimate=TrainEstimate(num_gpus=5, mfu=0.5))
    assert estimate(sharded).memory["none"] < five.memory["none"]
    with pytest.raises(ValueError, match=r"num_gpus=3 cannot share data\.batch_size=10"):
        estimate(replace(run, estimate=TrainEstimate(num_gpus=3)))


def test_the_mfu_is_measured_or_said_to_be_assumed(run: TrainConfig, tmp_path: Path) -> None:
    asked = replace(run, estimate=TrainEstimate(device="h200-141gb"))
    asked = replace(asked, model=replace(M300, vocab_size=97))
    mfu, source = chosen_mfu(asked, tmp_path / "nothing")
    assert mfu == module.ASSUMED_MFU
    assert source.startswith("assumed: nothing was measured on a h200")
    folder = tmp_path / "results" / "nvidia-h200"
    folder.mkdir(parents=True)
    rows = [
        {"model": "300m", "context": 4096, "way": "ours", "mfu": 0.47},
        {"model": "300m", "context": 4096, "way": "plain", "failed": "no memory"},
        {"model": "1_5b", "context": 4096, "way": "ours", "mfu": 0.52},
    ]
    (folder / "step-300m-4k-none.json").write_text(json.dumps({"results": rows}))
    mfu, source = chosen_mfu(asked, tmp_path / "results")
    assert mfu == 0.47
    assert source == "measured: nvidia-h200/step-300m-4k-none.json, ours"
    assert chosen_mfu(run, tmp_path / "results") == (0.5, "estimate.mfu")


def test_a_multirun_is_summed_up(run: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "estimated", [])
    assert "runs so far" not in report(run)
    assert f"2 runs so far: {2 * 20_000:,} tokens" in report(replace(run, seed=1))


def test_the_command_trains_nothing(run: TrainConfig, tmp_path: Path) -> None:
    printed = run_script(
        "train.py",
        "estimate=true",
        "estimate.device=a100-80gb",
        f"data.root={tmp_path}",
        "data.context_length=100",
        "data.batch_size=10",
        "model=300m",
        f"output={tmp_path / 'runs'}",
    ).stdout
    assert "usable on a100-80gb: activation_checkpointing=none" in printed
    assert "GPU-hours" in printed
    assert not (tmp_path / "runs").exists()


def test_of_a_star_search_the_first_round_is_estimated(run: TrainConfig, tmp_path: Path) -> None:
    printed = run_script(
        "train.py",
        "-m",
        "sweep=star_real",
        "estimate=true",
        "estimate.device=a100-80gb",
        f"data.root={tmp_path}",
        "data.context_length=100",
        "data.batch_size=10",
        "recipe.epochs=2,4",
        "recipe.learning_rate=1e-3,3e-3",
        "recipe.weight_decay=0.4",
        f"output={tmp_path / 'runs'}",
    ).stdout
    assert "3 runs so far" in printed  # the centre and one neighbour on each of two axes
    assert "estimated is the first round" in printed
    left = {path.name for path in (tmp_path / "runs").rglob("*")}
    assert not left & {"result.json", "results.json", "star"}
