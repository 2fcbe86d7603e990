"""The decoder: shapes, parameter counts, isolation of segments, the loss."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from trainer.config.schema import ModelConfig
from trainer.model.llama import Llama

CONF = Path(__file__).parents[3] / "conf" / "train" / "model"
TINY = ModelConfig(32, 64, 2, 4, 2, vocab_size=61)


def run(model: Llama, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return model.hidden_states(ids, positions, borders, max(lengths))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("150m", 154_147_328),
        ("300m", 299_649_792),
        ("600m", 602_457_088),
        ("1_5b", 1_540_732_416),
    ],
)
def test_paper_sizes(name: str, parameters: int) -> None:
    config = ModelConfig(**yaml.safe_load((CONF / f"{name}.yaml").read_text()), vocab_size=128_256)
    assert config.parameter_count() == parameters


def test_parameter_count_matches_the_module() -> None:
    assert TINY.parameter_count() == sum(p.numel() for p in Llama(TINY).parameters())


def test_a_packed_segment_equals_the_segment_alone() -> None:
    model = Llama(TINY)
    ids = torch.randint(61, (30,), generator=torch.Generator().manual_seed(0))
    packed = run(model, ids, [7, 1, 22])
    torch.testing.assert_close(packed[8:], run(model, ids[8:], [22]))
    torch.testing.assert_close(packed[:7], run(model, ids[:7], [7]))


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    model = Llama(TINY)
    ids = torch.randint(61, (20,), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-1)
    targets[-1] = -100
    borders = torch.tensor([0, 20], dtype=torch.int32)
    loss = model(ids, torch.arange(20), borders, 20, targets)
    logits = run(model, ids, [20]).double() @ model.lm_head.weight.double().T
    torch.testing.assert_close(loss.double(), F.cross_entropy(logits, targets))


def test_same_seed_same_weights_other_seed_other_weights() -> None:
    first, again, other = (Llama(TINY, seed).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "num_heads=5"),
        ({"num_kv_heads": 3}, "num_kv_heads=3"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, float], message: str) -> None:
    config = ModelConfig(**{**TINY.__dict__, **change})
    with pytest.raises(ValueError, match=message):
        Llama(config)
