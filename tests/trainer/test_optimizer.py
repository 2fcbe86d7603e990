"""Weight-decay groups and schedules."""

import itertools

import pytest

from trainer.config import OptimizerConfig, RecipeConfig, ScheduleKind
from trainer.model import Llama, ModelConfig
from trainer.optimizer import build_optimizer, learning_rate


def test_norms_and_input_embedding_are_not_decayed_the_head_is() -> None:
    model = Llama(ModelConfig(32, 64, 2, 4, 2, vocab_size=61))
    decayed, exempt = build_optimizer(
        model, OptimizerConfig(), RecipeConfig(weight_decay=1.6)
    ).param_groups
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (1.6, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    exempt_names = {names[id(parameter)] for parameter in exempt["params"]}
    assert exempt_names == {
        name for name in names.values() if "norm" in name or "embed_tokens" in name
    }
    assert "lm_head.weight" in {names[id(parameter)] for parameter in decayed["params"]}
    assert len(decayed["params"]) + len(exempt["params"]) == len(names)


def test_cosine_warms_up_for_one_percent_and_ends_near_zero() -> None:
    rates = [learning_rate(step, 1000, 3e-3, OptimizerConfig()) for step in range(1000)]
    assert rates[0] == pytest.approx(3e-4)
    assert rates[9] == rates[10] == pytest.approx(3e-3)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert rates[-1] < 1e-7


def test_wsd_holds_then_falls_linearly() -> None:
    config = OptimizerConfig(schedule=ScheduleKind.wsd, decay_fraction=0.25, min_ratio=0.1)
    rates = [learning_rate(step, 400, 1.0, config) for step in range(401)]
    assert set(rates[4:301]) == {1.0}
    assert rates[350] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[400] == pytest.approx(0.1)


def test_runs_shorter_than_the_warm_up_resolution_start_at_the_peak() -> None:
    assert learning_rate(0, 20, 1.0, OptimizerConfig()) == 1.0
