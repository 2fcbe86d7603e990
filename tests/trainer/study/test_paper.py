"""The paper's experiments compose to runs that can start, with the values it published."""

from dataclasses import replace
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
    for name in ("ensemble-real", "stitched-g32"):
        config = composed(f"experiment=paper/{name}", "tuning=ensemble", "seed=3")
        assert (config.seed, config.data.order_seed) == (3, 3)


CONTEXTS = sorted(path.stem for path in Path(CONF, "context").glob("*.yaml"))


@pytest.mark.parametrize("choice", CONTEXTS)
def test_a_context_is_one_choice_for_every_recipe(choice: str) -> None:
    length = int(choice.removesuffix("_tokens"))
    text = Path(CONF, "context", f"{choice}.yaml").read_text()
    for kind, losses in paper.BY_CONTEXT.items():
        plain = composed(f"experiment=paper/{kind}-g16")
        config = composed(f"experiment=paper/{kind}-g16", f"context={choice}")
        assert config == replace(plain, data=replace(plain.data, context_length=length))
        assert length not in losses or f"{kind} {losses[length]}" in text


@pytest.mark.parametrize("generations", [2, 4, 8, 16, 32])
def test_the_optimum_of_simple_is_a_choice_for_the_others(generations: int) -> None:
    (simple,) = (t for t in paper.TUNED if (t.kind, t.generations) == ("simple", generations))
    for kind in ("stitched", "latent"):
        chosen = (f"experiment=paper/{kind}-g{generations}", f"tuning=simple_g{generations}")
        recipe = composed(*chosen).recipe
        assert recipe.synthetic == f"{kind}-g{generations}"
        for key in ("epochs", "mixing_fraction", "learning_rate", "weight_decay"):
            assert getattr(recipe, key) == getattr(simple, key)


def test_students_and_masks_are_choices() -> None:
    config = composed("experiment=paper/latent-g32", "tuning=student_1_5b", "mask=document")
    config.check()
    assert config.model.hidden_size == composed("model=1_5b").model.hidden_size
    assert (config.recipe.learning_rate, config.recipe.generations) == (1e-3, 32)
    assert config.data.mask.value == "document"
    text = Path(CONF, "mask", "document.yaml").read_text()
    for (kind, _), losses in paper.MASKS.items():
        assert kind == "stitched" or str(losses["document"]) in text


def test_the_cap_changes_the_stream_and_nothing_else() -> None:
    capped = composed("experiment=paper/stitched-g32", "recipe.max_generations=4")
    assert capped.recipe.synthetic == "stitched-g4"
    plain = composed("experiment=paper/stitched-g32", "recipe.generations=4")
    assert capped.science_hash({}) == plain.science_hash({})
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
