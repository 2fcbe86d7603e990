"""Compiled blocks: the losses of eager ones, and nothing compiled again when the data changes."""

import numpy as np
import pytest
import torch

from tests.trainer.conftest import VOCABULARY, StreamMaker
from trainer.config.schema import Mask, ModelConfig
from trainer.data.batches import BatchLoader
from trainer.data.plan import Plan, Source
from trainer.model.llama import Llama


@pytest.mark.parametrize("mask", list(Mask))
def test_nothing_is_compiled_again_after_the_second_step(
    make_stream: StreamMaker, mask: Mask
) -> None:
    generator = np.random.default_rng(0)
    stream = make_stream("real", [generator.integers(1, 20, 3).tolist() for _ in range(40)])
    plan = Plan([Source("real", stream.lengths, 1.0)], 64, 2, "whole", seed=0)
    loader = BatchLoader(
        plan, [stream], mask, rank=0, world_size=1, micro_batch_size=None, start_step=0, stop_step=8
    )
    config = ModelConfig(32, 64, 2, 2, 1, vocab_size=VOCABULARY)
    eager, compiled = Llama(config), Llama(config)
    for layer in compiled.model.layers:
        layer.compile(backend="aot_eager")
    borders = set()
    try:
        for step, [batch] in loader:
            torch._dynamo.config.error_on_recompile = step >= 2
            losses = []
            for model in (eager, compiled):
                loss = model(
                    batch.input_ids,
                    batch.positions,
                    batch.cu_seqlens,
                    batch.max_seqlen,
                    batch.targets,
                )
                loss.backward()
                losses.append(loss.item())
            assert losses[0] == pytest.approx(losses[1], rel=1e-6)
            borders.add(tuple(batch.cu_seqlens.tolist()))
    finally:
        torch._dynamo.config.error_on_recompile = False
        torch._dynamo.reset()
    assert mask is Mask.none or len(borders) == 8
