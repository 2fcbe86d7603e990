"""The ways of taking a step that are timed against each other compute the same gradients."""

import pytest
import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.train_step import (
    Setting,
    hugging_face,
    model_config,
    ours,
    plain,
    random_batch,
)
from trainer.config.schema import DataConfig, TrainConfig
from trainer.parallel.ranks import Ranks


def gradients(setting: Setting, step: timing.Candidate) -> dict[str, Tensor]:
    """What the optimiser is given."""
    found: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        for name, parameter in setting.weights.named_parameters():
            assert parameter.grad is not None
            found[name] = parameter.grad.clone()
            parameter.grad.zero_()  # the next way starts at the same weights

    hook = setting.optimizer.register_step_pre_hook(keep)
    step()
    hook.remove()
    return found


@pytest.mark.parametrize("document", [0, 30])
def test_all_ways_compute_the_same_gradients(document: int) -> None:
    config = TrainConfig(
        data=DataConfig(context_length=128, batch_size=4), model=model_config("tiny", 1000)
    )
    config.recipe.weight_decay = 0.0
    batch = random_batch(512, 128, document, 1000)
    setting = Setting(config, batch, Ranks(0, 1, torch.device("cpu")))
    with torch.compiler.set_stance("force_eager"):
        right = gradients(setting, ours(setting))
        for way in (plain, hugging_face):
            found = gradients(setting, way(setting))
            for name, gradient in right.items():
                torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
