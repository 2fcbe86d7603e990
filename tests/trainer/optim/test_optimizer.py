"""Groups, schedules, averages of the weights, bad steps."""

import itertools

import pytest
import torch

from trainer.config.schema import (
    Averaging,
    BadStep,
    DecaySchedule,
    ModelConfig,
    OptimizerConfig,
    OptimizerKind,
    RecipeConfig,
    ScheduleKind,
)
from trainer.errors import NonFiniteLossError
from trainer.model.llama import Llama
from trainer.optim.averaging import WeightAverage
from trainer.optim.bad_steps import StepGuard
from trainer.optim.optimizer import build_optimizers, learning_rate, set_schedules, weight_decay
from trainer.run.progress import Progress


def test_norms_and_input_embedding_are_not_decayed_the_head_is() -> None:
    model = Llama(ModelConfig(32, 64, 2, 4, 2, vocab_size=61))
    [adamw] = build_optimizers(model, OptimizerConfig(), RecipeConfig(weight_decay=1.6))
    decayed, exempt = adamw.param_groups
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
    config = OptimizerConfig(schedule=ScheduleKind.wsd, lr_decay_fraction=0.25, min_lr_ratio=0.1)
    rates = [learning_rate(step, 400, 1.0, config) for step in range(401)]
    assert set(rates[4:301]) == {1.0}
    assert rates[350] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[400] == pytest.approx(0.1)


def test_runs_shorter_than_the_warm_up_resolution_start_at_the_peak() -> None:
    assert learning_rate(0, 20, 1.0, OptimizerConfig()) == 1.0


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    model = Llama(ModelConfig(32, 64, 2, 4, 2, vocab_size=61))
    config = OptimizerConfig(kind=OptimizerKind.muon, decay_embeddings=True)
    muon, adamw = build_optimizers(model, config, RecipeConfig(weight_decay=1.6))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    hidden = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert hidden == {name for name in names.values() if "proj" in name}
    decayed = {names[id(p)] for p in adamw.param_groups[0]["params"]}
    assert decayed == {"model.embed_tokens.weight", "lm_head.weight"}


def test_schedules_reach_every_group_and_spare_the_exempt() -> None:
    model = Llama(ModelConfig(32, 64, 2, 4, 2, vocab_size=61))
    config = OptimizerConfig(
        kind=OptimizerKind.muon, weight_decay_schedule=DecaySchedule.linear, warmup_fraction=0.0
    )
    recipe = RecipeConfig(weight_decay=1.6)
    optimizers = build_optimizers(model, config, recipe)
    assert weight_decay(99, 100, 1.6, OptimizerConfig()) == 1.6
    for step in (0, 50, 99):
        rate = set_schedules(optimizers, step, 100, config, recipe)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        assert {group["lr"] for group in groups} == {rate}
        decay = 1.6 * (100 - step) / 100
        assert [group["weight_decay"] for group in groups] == [decay, decay, 0.0]


def test_averages_equal_their_definitions() -> None:
    steps, parameter = 40, torch.nn.Linear(1, 1, bias=False)
    values = torch.randn(steps, generator=torch.Generator().manual_seed(0)).double()
    expected = {
        Averaging.swa: values[30:].mean(),
        Averaging.ema: values[0],
    }
    for step in range(1, steps):
        decay = min(0.8, (1 + step) / (10 + step))
        expected[Averaging.ema] = decay * expected[Averaging.ema] + (1 - decay) * values[step]
    for kind, right in expected.items():
        config = OptimizerConfig(averaging=kind, ema_decay=0.8, swa_fraction=0.25)
        with torch.no_grad():
            parameter.weight.fill_(values[0])
            average = WeightAverage(parameter, config, steps)
            for step in range(steps):
                parameter.weight.fill_(values[step])
                average.update(step)
            with average.in_place():
                assert parameter.weight.item() == pytest.approx(right.item(), abs=1e-6)
            assert parameter.weight.item() == pytest.approx(values[-1].item())


def blame(problem: str) -> str:
    return f"step 7: the {problem}"


def test_spikes_and_non_finite_gradients_stop_or_are_skipped() -> None:
    skipping = StepGuard(OptimizerConfig(on_bad_step=BadStep.skip, spike_factor=5.0))
    assert skipping.accepts(torch.tensor(1e6), blame)  # nothing is usual yet
    skipping = StepGuard(OptimizerConfig(on_bad_step=BadStep.skip, spike_factor=5.0))
    assert all(skipping.accepts(torch.tensor(2.0), blame) for _ in range(30))
    assert skipping.accepts(torch.tensor(9.9), blame)
    usual = skipping.usual
    assert not skipping.accepts(torch.tensor(11.5), blame)
    assert not skipping.accepts(torch.tensor(torch.nan), blame)
    assert (skipping.skipped, skipping.usual) == (2, usual)
    kept = Progress(32, "", "", 0.0, **skipping.state())
    assert kept.skipped_in_a_row == 2  # a kill within a streak must not begin it anew
    resumed = StepGuard(
        OptimizerConfig(spike_factor=5.0), skipping.usual, skipping.accepted, skipping.skipped
    )
    assert resumed.skipped == 2
    with pytest.raises(NonFiniteLossError, match=r"step 7: the gradient has norm 11.5 \(usually 2"):
        resumed.accepts(torch.tensor(11.5), blame)
    for _ in range(8):
        skipping.accepts(torch.tensor(torch.inf), blame)
    with pytest.raises(NonFiniteLossError, match="norm inf"):
        skipping.accepts(torch.tensor(torch.inf), blame)
    assert StepGuard(OptimizerConfig()).accepts(torch.tensor(torch.nan), blame)  # the log notices
