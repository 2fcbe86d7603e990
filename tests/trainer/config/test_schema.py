"""The schema of train.py: names, identities, refusals."""

import dataclasses
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from trainer.config.schema import TrainConfig, load_config, save_config
from trainer.entry import program
from trainer.run.inputs import run_dir_of

CONF = str(Path(__file__).parents[3] / "conf" / "train")


def composed(*overrides: str) -> TrainConfig:
    program("train", TrainConfig)(lambda _: None)  # tells Hydra of the schema and of the log
    with initialize_config_dir(CONF, version_base="1.3"):
        config = OmegaConf.to_object(compose("config", list(overrides)))
    assert isinstance(config, TrainConfig)
    return config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recipe.learning_rat=1", "learning_rat"),
        ("recipe.epochs=many", "epochs"),
        ("data.mask=diagonal", "diagonal"),
    ],
)
def test_unknown_keys_and_wrong_types_fail_before_anything_runs(
    override: str, message: str
) -> None:
    with pytest.raises(ConfigCompositionException, match=message):
        composed(override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recipe=stitched", "recipe.mixing_fraction=1"], r"must be in \[0, 1\)"),
        (["recipe=stitched", "recipe.mixing_fraction=0"], "do not fit"),
        (["recipe=stitched", "recipe.generations=0"], "generations=0"),
        (["data.context_length=1"], "data.context_length=1 must be in "),
        (["recipe.epochs=0"], "recipe.epochs=0"),
        (["recipe.weight_decay=-1"], "recipe.weight_decay=-1.0 must be at least 0"),
        (["data.batch_size=0"], "data.batch_size=0"),
        (["data.micro_batch_size=0"], "data.micro_batch_size=0 must be at least 1"),
        (["recipe.epochs=inf"], "recipe.epochs=inf must be in "),
        (["recipe.learning_rate=nan"], "recipe.learning_rate=nan"),
        (["data.order_seed=-1"], "data.order_seed=-1 must be in "),
        (["optimizer.max_grad_norm=0"], "optimizer.max_grad_norm=0"),
        (["optimizer.warmup_fraction=2"], r"optimizer.warmup_fraction=2.0 must be in \[0, 1\]"),
        (["optimizer.beta2=1"], r"optimizer.beta2=1.0 must be in \[0, 1\)"),
        (
            ["runtime.context_parallel=4", "data.context_length=4100"],
            "data.context_length=4100 must be a multiple of 8",
        ),
        (["runtime.shard_size=2"], "runtime.shard_size=2 needs runtime.parallel=fsdp"),
        (["model.num_heads=0"], "model.num_heads=0 must be at least 1"),
    ],
)
def test_values_that_cannot_work_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        composed(*overrides).check()


def test_the_paper_runs_compose() -> None:
    config = composed("recipe=stitched", "recipe.generations=32", "model=1_5b")
    config.check()
    assert config.recipe.synthetic == "stitched-g32"
    assert composed("recipe=stitched", "recipe.stream=stitched-no-real").recipe.synthetic == (
        "stitched-g8-no-real"
    )
    assert composed().recipe.synthetic is None


def test_the_run_folder_is_named_by_what_is_learnt() -> None:
    config = composed("recipe=stitched")
    other_machine = composed(
        "recipe=stitched",
        "runtime.device=cpu",
        "data.micro_batch_size=2",
        "tracking.log_every=1",
        "data.root=elsewhere",
    )
    inputs = {"real": "1", "stitched-g8": "2", "val": "3"}
    folder = run_dir_of(config, inputs)
    assert folder == run_dir_of(other_machine, inputs)
    assert folder.name.startswith("stitched-g8-")
    for name in inputs:
        assert run_dir_of(config, {**inputs, name: "other"}) != folder
    for override in ("seed=1", "data.order_seed=1", "recipe.epochs=3", "data.mask=megadoc"):
        assert run_dir_of(composed("recipe=stitched", override), inputs) != folder


def test_a_saved_config_comes_back(tmp_path: Path) -> None:
    config = composed("recipe=latent", "model=2m", "data.packing=windows")
    save_config(config, tmp_path / "config.yaml")
    assert dataclasses.asdict(load_config(tmp_path / "config.yaml")) == dataclasses.asdict(config)
