"""Losses, speeds and the ledger of tokens between two log lines."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.config.schema import TrainConfig
from trainer.data.batches import PackedBatch
from trainer.data.mds import MegadocStream
from trainer.data.plan import Plan
from trainer.errors import NonFiniteLossError
from trainer.model.flops import attention_pairs, peak_flops, training_flops
from trainer.optim.bad_steps import full_value
from trainer.parallel.ranks import Ranks


class Meter:
    """Losses and speeds between two log lines, kept on the device until they are read."""

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        plan: Plan,
        streams: list[MegadocStream],
        start_step: int,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.plan = plan
        self.streams = streams
        self.names = [stream.manifest.name for stream in streams]
        self.seen = sum(plan.tokens_seen(start_step))
        self.tokens_per_second = 0.0
        self.start_window()

    def start_window(self) -> None:
        """Begin to count anew: no steps, no waiting, the clock at zero."""
        self.count = 0
        self.steps: list[int] = []
        self.losses: list[Tensor] = []
        self.grad_norm = torch.zeros(())
        self.flops = 0
        self.waited = 0.0
        self.began = time.monotonic()

    def add(
        self,
        step: int,
        loss: Tensor,
        grad_norm: Tensor,
        micro_batches: list[PackedBatch],
        waited: float,
        taken: bool = True,
    ) -> None:
        """Note one step: this rank's share of the loss, its batches, its seconds without data."""
        self.count += 1
        if taken:
            self.steps.append(step)
            self.losses.append(loss)
            self.grad_norm = grad_norm
        flops = sum(batch_flops(self.config, batch) for batch in micro_batches)
        self.flops += flops // self.ranks.context_parallel
        self.waited += waited

    def read(self, done: int, rate: float) -> dict[str, int | float]:
        """Metrics of the steps since the last reading.

        Raises:
            NonFiniteLossError: a loss or the last gradient is NaN or infinite.
        """
        none = torch.zeros(0, device=self.ranks.device)
        losses = self.ranks.all_reduce(torch.stack(self.losses) if self.losses else none).tolist()
        for step, loss in zip(self.steps, losses, strict=True):
            if not math.isfinite(loss):
                raise NonFiniteLossError(self.blame(step, f"loss is {loss}"))
        grad_norm = full_value(self.grad_norm)
        if not math.isfinite(grad_norm):  # the loss is of the weights before the step
            raise NonFiniteLossError(self.blame(self.steps[-1], f"gradient has norm {grad_norm}"))
        elapsed = time.monotonic() - self.began
        tokens = self.plan.tokens_seen(done)
        self.tokens_per_second = (sum(tokens) - self.seen) / elapsed
        self.seen = sum(tokens)
        metrics: dict[str, int | float] = {
            **({"train/loss": sum(losses) / len(losses)} if losses else {}),
            **({"train/skipped_steps": skipped} if (skipped := self.count - len(losses)) else {}),
            "train/learning_rate": rate,
            "train/grad_norm": grad_norm,
            "speed/tokens_per_second": self.tokens_per_second,
            "speed/step_seconds": elapsed / self.count,
            "speed/data_wait_seconds": self.waited / self.count,
        }
        peak = peak_flops(self.ranks.device)
        if peak:
            metrics["speed/mfu"] = self.flops / elapsed / peak
        if self.ranks.device.type == "cuda":
            metrics["memory/peak_bytes"] = torch.cuda.max_memory_allocated()
        for name, count, epochs in zip(
            self.names, tokens, self.plan.epochs_seen(done), strict=True
        ):
            metrics[f"tokens/{name}"] = count
            metrics[f"epochs/{name}"] = epochs
        self.start_window()
        return metrics

    def shown(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """What stands beside the progress bar; the loss is that of the steps that were taken."""
        loss = f"{metrics['train/loss']:.3f}" if "train/loss" in metrics else "all steps skipped"
        return {"loss": loss, "tok/s": f"{self.tokens_per_second:,.0f}"}

    def blame(self, step: int, problem: str) -> str:
        """Say what is wrong with a step and name its documents."""
        documents = sorted(
            {
                f"{self.names[window.source]}:{self.streams[window.source][int(index)].id}"
                for window in self.plan.windows(step)
                for index in window.documents
            }
        )
        shown = ", ".join(documents[:20]) + (", ..." if len(documents) > 20 else "")
        return (
            f"step {step}: the {problem}. Its {len(documents)} documents: {shown}. "
            "Checkpoints are from before it; lower recipe.learning_rate, or look at these documents"
        )


def batch_flops(config: TrainConfig, batch: PackedBatch) -> int:
    """Model FLOPs of one micro-batch of this rank (``batch`` still on the CPU)."""
    return training_flops(config.model, batch.tokens, attention_pairs(batch.cu_seqlens))
