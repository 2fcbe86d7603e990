"""The paper's experiments compose to runs that can start, with the values it published."""

from pathlib import Path

import pytest

from tests.trainer.config.test_schema import CONF, composed
from trainer.study import paper

EXPERIMENTS = sorted(
    path.stem for path in Path(CONF, "experiment", "paper").glob("*.yaml") if path.stem != "base"
)
BEYOND = sorted(f"beyond/{path.stem}" for path in Path(CONF, "experiment", "beyond").glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_a_valid_run(name: str) -> None:
    config = composed(f"experiment=paper/{name}")
    config.check()
    assert config.data.batch_size == 64
    assert config.data.packing.value == "windows"


@pytest.mark.parametrize("name", EXPERIMENTS[::9])
def test_a_scale_shrinks_what_costs_and_keeps_the_recipe(name: str) -> None:
    config = composed(f"experiment=paper/{name}")
    small = composed(f"experiment=paper/{name}", "scale=cpu")
    small.check()
    assert small.model.hidden_size == 128
    assert small.data.context_length == 256
    assert small.recipe.used_generations <= 4
    kept = ("epochs", "mixing_fraction", "learning_rate", "weight_decay")
    assert all(getattr(small.recipe, key) == getattr(config.recipe, key) for key in kept)


@pytest.mark.parametrize("name", ["demo", "slowrun_tiny", *BEYOND])
def test_experiments_beyond_the_paper_are_valid_runs(name: str) -> None:
    config = composed(f"experiment={name}")
    config.check()
    if name in BEYOND:
        assert config.data.context_length * config.data.batch_size == 262_144
        assert config.recipe.stream == "stitched"
    composed(f"experiment={name}", "scale=30m").check()


def test_all_sixteen_tuned_recipes_are_there() -> None:
    assert len(paper.TUNED) == 16
    for tuned in paper.TUNED:
        name = f"{tuned.kind}-g{tuned.generations}" if tuned.generations else tuned.kind
        config = composed(f"experiment=paper/{name}")
        recipe = config.recipe
        assert (recipe.stream or recipe.real_stream, recipe.used_generations) == (
            tuned.kind,
            tuned.generations,
        )
        for key in ("epochs", "mixing_fraction", "learning_rate", "weight_decay"):
            assert getattr(recipe, key) == getattr(tuned, key), (name, key)
        loss = paper.published_loss(tuned.kind, tuned.generations, "none", 4096)
        if tuned.loss is not None:
            assert loss == tuned.loss
        text = Path(CONF, "experiment", "paper", f"{name}.yaml").read_text()
        assert tuned.loss is None or f"{tuned.loss:g}" in text


def test_members_of_an_ensemble_differ_in_both_seeds() -> None:
    config = composed("experiment=paper/ensemble-stitched", "seed=3")
    assert (config.seed, config.data.order_seed) == (3, 3)


def test_the_cap_changes_the_stream_and_nothing_else() -> None:
    capped = composed("experiment=paper/stitched-g32", "recipe.max_generations=4")
    assert capped.recipe.synthetic == "stitched-g4"
    plain = composed("experiment=paper/stitched-g32", "recipe.generations=4")
    assert capped.science_hash() == plain.science_hash()
    with pytest.raises(ValueError, match="max_generations=0"):
        composed("recipe.max_generations=0").check()


@pytest.mark.parametrize(
    ("where", "loss"),
    [
        (("real", 0, "none", 4096), 3.5544),
        (("real", 0, "document", 4096), 3.548),
        (("stitched", 8, "none", 4096), 3.417),
        (("stitched-real-first", 8, "none", 4096), 3.422),
        (("latent", 16, "none", 8192), 3.379),
        (("latent", 8, "none", 8192), None),
        (("stitched", 8, "megadoc", 4096), None),
    ],
)
def test_published_losses_are_found_by_shape(
    where: tuple[str, int, str, int], loss: float | None
) -> None:
    assert paper.published_loss(*where) == loss
