"""What a run will cost, before a GPU is rented: ``python train.py estimate=true ...``.

Steps, tokens and attended pairs come from the run's own plan, memory from the estimate that chooses
what is computed again. The time is FLOPs over the GPU's peak times an MFU that was measured
(``benchmarks/results``) or is said to be assumed; evaluations and checkpoints are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tabulate import tabulate

from trainer.config.estimate import DEVICES
from trainer.config.schema import ActivationCheckpointing, ModelConfig, Parallel, TrainConfig
from trainer.data.batches import collate
from trainer.data.mds import MegadocStream
from trainer.data.plan import Plan
from trainer.files import read_json
from trainer.model.flops import attention_pairs, training_flops
from trainer.parallel.activation_checkpointing import USABLE, step_bytes
from trainer.run.inputs import read_inputs, run_dir_of
from trainer.setup import model_vocabulary, open_streams, plan_data

ASSUMED_MFU = 0.4
SAMPLED_STEPS = 4  # whose attended pairs stand for all
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MODELS = ROOT / "conf" / "train" / "model"
MODES = [mode for mode in ActivationCheckpointing if mode is not ActivationCheckpointing.auto]
estimated: list[Estimate] = []  # the jobs of a multirun, one after the other in one process


@dataclass(frozen=True)
class Estimate:
    """The cost of one run."""

    name: str
    parameters: int
    steps: int
    tokens: int  # places of all windows
    flops: int  # of the model, without what is computed again
    attention_share: float  # of the FLOPs
    memory: dict[str, int]  # bytes of one step on one GPU, by what is computed again
    device: str
    num_gpus: int
    mode: str | None  # what would be computed again; None: nothing fits
    mfu: float
    source: str  # of the MFU

    @property
    def gpu_hours(self) -> float:
        """GPUs x hours; what is computed again costs a forward pass, or one without attention."""
        again = {"none": 0.0, "selective": (1 - self.attention_share) / 3, "full": 1 / 3}
        flops = self.flops * (1 + again[self.mode or "full"])
        return flops / (DEVICES[self.device][1] * self.mfu) / 3600

    def __str__(self) -> str:
        gib = 2**30
        room = USABLE * DEVICES[self.device][0] / gib
        memory = ", ".join(f"{mode} {size / gib:.1f}" for mode, size in self.memory.items())
        verdict = f"activation_checkpointing={self.mode}"
        if self.mode is None:
            verdict = (
                "does not fit: try a smaller data.micro_batch_size, runtime.parallel=fsdp, "
                "runtime.context_parallel or runtime.loss_memory=lean"
            )
        lines = {
            "name": self.name,
            "model": f"{self.parameters:,} parameters",
            "run": f"{self.steps:,} steps, {self.tokens:,} tokens, {self.flops:.2e} FLOPs "
            f"({self.attention_share:.0%} attention)",
            "memory": f"{memory} GiB of {room:.1f} usable on {self.device}: {verdict}",
            "time": f"{self.gpu_hours / self.num_gpus:,.2f} hours on {self.num_gpus} GPU(s), "
            f"{self.gpu_hours:,.2f} GPU-hours, at {self.mfu:.0%} MFU ({self.source})",
        }
        return tabulate(lines.items(), tablefmt="plain")


@dataclass(frozen=True)
class Work:
    """What a run computes, on whatever machine."""

    config: TrainConfig  # with the tokenizer's vocabulary
    streams: list[MegadocStream]
    plan: Plan
    steps: int
    step_tokens: int  # places of the windows of a step
    matrix_flops: int  # of a step
    attention_flops: int  # of a step

    @property
    def tokens(self) -> int:
        """Places of all windows."""
        return self.steps * self.step_tokens

    @property
    def flops(self) -> int:
        """Of the model, without what is computed again."""
        return self.steps * (self.matrix_flops + self.attention_flops)


def work_of(config: TrainConfig) -> Work:
    """Steps, tokens and FLOPs of a run from its own plan; nothing is trained.

    Raises:
        FileNotFoundError, ValueError: as :func:`trainer.loop.train` before it trains.
    """
    config.check()
    streams = open_streams(config)
    model = replace(config.model, vocab_size=model_vocabulary(config, streams[0]))
    config = replace(config, model=model)
    plan = plan_data(config, streams)
    steps = plan.steps(config.recipe.epochs)
    sampled = min(steps, SAMPLED_STEPS)
    pairs = 0
    for step in range(sampled):
        windows = plan.windows(step)
        batch = collate(windows, streams, config.data.mask, config.data.context_length)
        pairs += attention_pairs(batch.cu_seqlens)
    step_tokens = config.data.batch_size * config.data.context_length
    attention = training_flops(model, 0, pairs) // sampled
    matrices = training_flops(model, step_tokens, 0)
    return Work(config, streams, plan, steps, step_tokens, matrices, attention)


def estimate(config: TrainConfig) -> Estimate:
    """The cost of a run.

    Raises:
        FileNotFoundError, ValueError: as :func:`trainer.loop.train` before it trains.
    """
    work = work_of(config)
    config, wanted, runtime = work.config, config.estimate, config.runtime
    data_ranks, rest = divmod(wanted.num_gpus, runtime.context_parallel)
    windows_each = config.data.batch_size // max(1, data_ranks)
    if rest or config.data.batch_size % data_ranks:
        raise ValueError(
            f"estimate.num_gpus={wanted.num_gpus} cannot share data.batch_size="
            f"{config.data.batch_size} windows with runtime.context_parallel="
            f"{runtime.context_parallel}; make one a multiple of the other"
        )
    micro = config.data.micro_batch_size or windows_each
    tokens = micro * config.data.context_length // runtime.context_parallel
    sharded = runtime.parallel is Parallel.fsdp
    shards = (runtime.shard_size or wanted.num_gpus) if sharded else 1
    memory = {mode.value: step_bytes(config, tokens, shards, mode) for mode in MODES}
    asked = runtime.activation_checkpointing
    modes = [mode.value for mode in (MODES if asked is ActivationCheckpointing.auto else [asked])]
    room = USABLE * DEVICES[wanted.device][0]
    mfu, source = chosen_mfu(config)
    return Estimate(
        run_dir_of(config, read_inputs(config)).name,
        config.model.parameter_count(),
        work.steps,
        work.tokens,
        work.flops,
        work.attention_flops / (work.matrix_flops + work.attention_flops),
        memory,
        wanted.device,
        wanted.num_gpus,
        next((mode for mode in modes if memory[mode] <= room), None),
        mfu,
        source,
    )


def chosen_mfu(config: TrainConfig, results: Path = RESULTS) -> tuple[float, str]:
    """The MFU that is reckoned with, and where it comes from."""
    wanted = config.estimate
    if wanted.mfu is not None:
        return wanted.mfu, "estimate.mfu"
    part = wanted.device.partition("-")[0]
    nearest: tuple[float, float, str] | None = None
    for file in sorted(results.glob(f"*{part}*/step-*.json")):
        for row in read_json(file)["results"]:
            if row.get("mfu") is None:
                continue
            measured = model_of(row["model"], config.model.vocab_size)
            distance = abs(
                math.log(measured.parameter_count() / config.model.parameter_count())
            ) + abs(math.log(row["context"] / config.data.context_length))
            where = f"measured: {file.parent.name}/{file.name}, {row['way']}"
            if nearest is None or (distance, -row["mfu"]) < (nearest[0], -nearest[1]):
                nearest = distance, row["mfu"], where
    if nearest is not None:
        return nearest[1], nearest[2]
    return ASSUMED_MFU, f"assumed: nothing was measured on a {part} yet; estimate.mfu=... sets it"


def model_of(name: str, vocabulary: int) -> ModelConfig:
    """A size of ``conf/train/model`` with the run's vocabulary."""
    loaded: Any = OmegaConf.load(MODELS / f"{name}.yaml")
    return ModelConfig(**(dict(loaded) | {"vocab_size": vocabulary}))


def report(config: TrainConfig) -> str:
    """The estimate of a run and, from the second job of a multirun on, of all so far."""
    estimated.append(estimate(config))
    text = str(estimated[-1])
    if len(estimated) > 1:
        hours = sum(one.gpu_hours for one in estimated)
        tokens = sum(one.tokens for one in estimated)
        text += f"\n{len(estimated)} runs so far: {tokens:,} tokens, {hours:,.2f} GPU-hours"
    return text
