"""Recomputing blocks: the same gradients to the bit, and the choice by memory."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from trainer.config.schema import (
    ActivationCheckpointing,
    AttentionBackend,
    Averaging,
    DataConfig,
    DistillationConfig,
    ModelConfig,
    OptimizerConfig,
    RuntimeConfig,
    TrainConfig,
)
from trainer.model.llama import Llama
from trainer.parallel.activation_checkpointing import recompute_blocks, step_bytes

M300 = ModelConfig(768, 2688, 12, 12, 12, vocab_size=128_256)


def gradients(mode: ActivationCheckpointing, compiled: bool) -> tuple[list[torch.Tensor], int]:
    """Gradients of a step with dropout, and how often attention was computed."""
    model = Llama(ModelConfig(32, 64, 2, 2, 1, vocab_size=61, dropout=0.1))
    calls = 0

    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            nonlocal calls
            calls += "scaled_dot_product" in str(func) and "backward" not in str(func)
            return func(*args, **(kwargs or {}))

    recompute_blocks(model, mode)
    if compiled:
        for layer in model.model.layers:
            layer.compile(backend="aot_eager")
    ids = torch.arange(24) % 61
    borders = torch.tensor([0, 10, 24], dtype=torch.int32)
    positions = torch.cat((torch.arange(10), torch.arange(14)))
    torch.manual_seed(0)
    with Counted() if not compiled else torch.enable_grad():  # type: ignore[no-untyped-call]
        model(ids, positions, borders, 14, ids.roll(-1)).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None], calls


@pytest.mark.parametrize("mode", [ActivationCheckpointing.selective, ActivationCheckpointing.full])
def test_gradients_are_the_same_to_the_bit_and_attention_is_kept(
    mode: ActivationCheckpointing,
) -> None:
    expected, once = gradients(ActivationCheckpointing.none, False)
    found, calls = gradients(mode, False)
    assert len(found) == len(expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    compiled, _ = gradients(mode, True)
    torch.testing.assert_close(compiled, expected)
    assert calls == (once if mode is ActivationCheckpointing.selective else 2 * once)


def run(context: int) -> TrainConfig:
    return TrainConfig(data=DataConfig(context_length=context, batch_size=1), model=M300)


def test_the_estimate_says_what_fits_where() -> None:
    gib = 2**30
    assert step_bytes(run(131_072), 131_072, 1, ActivationCheckpointing.none) < 80 * gib
    assert step_bytes(run(1_048_576), 1_048_576, 1, ActivationCheckpointing.none) > 141 * gib
    assert step_bytes(run(1_048_576), 1_048_576, 1, ActivationCheckpointing.full) < 131 * gib
    sizes = [step_bytes(run(65_536), 65_536, 1, mode) for mode in list(ActivationCheckpointing)[1:]]
    assert sizes == sorted(sizes, reverse=True)
    for mode in list(ActivationCheckpointing)[1:]:  # 12 layers keep the whole axis, or one does
        alone, shared = (
            step_bytes(
                replace(run(32_768), runtime=RuntimeConfig(context_parallel=ranks)), 8192, 1, mode
            )
            for ranks in (1, 4)
        )
        times = 13 if mode is ActivationCheckpointing.none else 2
        axis = 2 * 2 * 768 * 32_768
        assert shared - alone == pytest.approx(1.25 * axis * times, rel=1e-6)
    averaged = replace(run(4096), optimizer=OptimizerConfig(averaging=Averaging.ema))
    taught = replace(run(4096), distillation=DistillationConfig(teachers=["a", "b"]))
    plain, *others = (
        step_bytes(config, 4096, 1, ActivationCheckpointing.none)
        for config in (run(4096), averaged, taught)
    )
    weights = 4 * M300.parameter_count()
    assert [other - plain for other in others] == [weights, 2 * weights]


def test_the_estimate_counts_what_the_backend_and_eager_blocks_hold() -> None:
    def size(**options: Any) -> int:
        config = TrainConfig(model=M300, runtime=RuntimeConfig(**options))
        return step_bytes(config, 65_536, 1, ActivationCheckpointing.none)

    backends = (AttentionBackend.flash, AttentionBackend.gluon, AttentionBackend.auto)
    flash, gluon, auto = (size(attention_backend=backend) for backend in backends)
    assert gluon == auto == flash + 1.25 * 4 * 65_536 * 768  # dQ in fp32
    eager = size(attention_backend=AttentionBackend.flash, compile=False)
    # Of each of 12 layers, one more product of 2,688 and three of 768, in half precision.
    assert eager == flash + 1.25 * 65_536 * 12 * 2 * (2688 + 3 * 768)
