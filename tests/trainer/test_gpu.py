"""Training on a real GPU: the CPU's curve, no waiting inside a step, memory."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from benchmarks.train_step import Setting, model_config, ours, random_batch
from tests.trainer.test_loop import config, metrics
from trainer.config.schema import (
    AttentionBackend,
    DataConfig,
    Dtype,
    LossBackend,
    ModelConfig,
    OptimizerConfig,
    RecipeConfig,
    RuntimeConfig,
    TrainConfig,
)
from trainer.loop import accumulate_gradients, train
from trainer.model.llama import KernelBackends, Llama
from trainer.optim.optimizer import build_optimizers
from trainer.parallel.ranks import Ranks
from trainer.run.inputs import run_dir_of
from trainer.setup import prepare_blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

WAYS = [("auto", "torch"), ("triton", "triton")]
HEADS_OF_64 = ModelConfig(128, 256, 2, 2, 1)  # what the half-precision kernels take


@pytest.mark.parametrize(("attention", "loss"), WAYS)
def test_it_learns_what_a_cpu_learns(
    corpus_root: Path, tmp_path: Path, attention: str, loss: str
) -> None:
    runtime = RuntimeConfig(
        num_threads=1, attention_backend=AttentionBackend(attention), loss_backend=LossBackend(loss)
    )
    on_gpu = config(corpus_root, tmp_path / "gpu", model=HEADS_OF_64, runtime=runtime)
    on_cpu = config(
        corpus_root,
        tmp_path / "cpu",
        model=HEADS_OF_64,
        runtime=RuntimeConfig(device="cpu", dtype=Dtype.bfloat16, num_threads=1),
    )
    assert train(on_gpu) == pytest.approx(train(on_cpu), abs=0.03)
    first, right = (metrics(run_dir_of(run))[0]["train/loss"] for run in (on_gpu, on_cpu))
    assert first == pytest.approx(right, abs=0.002)  # before any update


def steps_of(tokens: int, context: int, size: ModelConfig) -> TrainConfig:
    """A run of one micro-batch a step."""
    return TrainConfig(
        data=DataConfig(context_length=context, batch_size=tokens // context),
        recipe=RecipeConfig(),
        model=size,
        optimizer=OptimizerConfig(),
    )


@pytest.mark.parametrize(("attention", "loss"), WAYS)
def test_a_step_waits_for_nothing(attention: str, loss: str) -> None:
    size = replace(HEADS_OF_64, vocab_size=1000)
    settings = steps_of(4096, 1024, size)
    ranks = Ranks(0, 1, torch.device("cuda"))
    model = Llama(size, 0, torch.bfloat16, KernelBackends(attention, loss)).to("cuda")
    prepare_blocks(model, settings, ranks)
    [optimizer] = build_optimizers(model, settings.optimizer, settings.recipe)
    batches = [random_batch(4096, 1024, 300, 1000) for _ in range(4)]
    try:
        for number, batch in enumerate(batches):
            torch.cuda.set_sync_debug_mode("error" if number >= 2 else "default")
            accumulate_gradients(model, [batch], ranks)
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "gib", "device_gib"), [(131_072, 60, 75), (1_048_576, 141, 135)]
)
def test_one_megadoc_of_this_many_tokens_fits(tokens: int, gib: int, device_gib: int) -> None:
    memory = torch.cuda.get_device_properties(0).total_memory
    if memory < device_gib << 30:
        pytest.skip(f"the device has {memory >> 30} GiB")
    size = model_config("300m", 128_256)
    batch = random_batch(tokens, tokens, 0, size.vocab_size)
    ranks = Ranks(0, 1, torch.device("cuda"))
    step = ours(Setting(steps_of(tokens, tokens, size), batch, ranks))
    torch.cuda.reset_peak_memory_stats()
    step()
    assert torch.cuda.max_memory_allocated() <= gib << 30
