"""The schema of ``train.py``: every key a run can have, with its type and meaning.

``conf/train.yaml`` and its groups fill these dataclasses; nothing below ``train.py`` knows Hydra.
"""

from __future__ import annotations

import enum
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kernels.attention.interface import LACKS as ATTENTION_BACKENDS
from trainer.model.llama import ModelConfig


class Mask(enum.Enum):
    """Which tokens of a window may attend to each other."""

    none = "none"  # the whole window: the paper's headline runs
    document = "document"  # each member alone
    megadoc = "megadoc"  # members of one megadoc see each other, strangers do not


class Packing(enum.Enum):
    """How documents become windows; see ``trainer/data/packing.py``."""

    whole = "whole"  # documents stay whole; re-shuffled and re-packed each epoch
    stream = "stream"  # re-shuffled, concatenated and cut each epoch
    windows = "windows"  # the paper's way: concatenated and cut once, windows permuted


@dataclass
class DataConfig:
    """Where the streams lie and how they become batches."""

    root: str = "data/pydoc"  # corpus folder written by generate.py
    validation: str = "val"  # stream that is evaluated on
    context_length: int = 4096  # tokens in a window
    batch_size: int = 64  # windows in a step, over all ranks
    micro_batch_size: int | None = None  # windows in one forward pass of one rank; null: all
    mask: Mask = Mask.none
    packing: Packing = Packing.whole
    seed: int = 42  # order of the documents
    cache: str | None = None  # local folder for shards of a remote root


@dataclass
class RecipeConfig:
    """Stream, mixing fraction, epochs, learning rate and weight decay: what the paper tunes."""

    name: str = "real"
    base: str = "real"  # the stream whose passes are counted as epochs
    stream: str | None = None  # the synthetic stream mixed in: simple, stitched, latent, ...
    generations: int = 0  # G of the synthetic stream
    mixing_fraction: float = 0.0  # w: share of tokens that is synthetic
    epochs: float = 16.0  # E: passes over the base stream
    learning_rate: float = 3e-3
    weight_decay: float = 1.6
    max_generations: int | None = None  # a smaller scale's cap on generations

    @property
    def used_generations(self) -> int:
        """G of the stream that is read; 0 for real only."""
        if self.stream is None:
            return 0
        return min(self.generations, self.max_generations or self.generations)

    @property
    def synthetic(self) -> str | None:
        """Folder name of the synthetic stream, such as ``stitched-g8``; None for real only."""
        if self.stream is None:
            return None
        kind, _, variant = self.stream.partition("-")
        return "-".join(part for part in (kind, f"g{self.used_generations}", variant) if part)


class ScheduleKind(enum.Enum):
    cosine = "cosine"
    wsd = "wsd"  # warm up, hold, decay linearly


class OptimizerKind(enum.Enum):
    adamw = "adamw"
    muon = "muon"  # Muon for the matrices inside the blocks, AdamW for the rest


class DecaySchedule(enum.Enum):
    constant = "constant"
    linear = "linear"  # falls to 0 at the end of the run


class Averaging(enum.Enum):
    none = "none"
    ema = "ema"
    swa = "swa"


class BadStep(enum.Enum):
    stop = "stop"
    skip = "skip"


@dataclass
class OptimizerConfig:
    """Optimiser and schedules (defaults: the paper's), averages of the weights, bad steps."""

    kind: OptimizerKind = OptimizerKind.adamw
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    muon_momentum: float = 0.95
    clip_norm: float = 1.0
    schedule: ScheduleKind = ScheduleKind.cosine
    warmup_fraction: float = 0.01
    decay_fraction: float = 0.2  # wsd only: share of the steps in the final decay
    min_ratio: float = 0.0  # learning rate at the end, as a share of the peak
    weight_decay_schedule: DecaySchedule = DecaySchedule.constant
    decay_embeddings: bool = False  # the paper exempts the input embedding
    averaging: Averaging = Averaging.none  # what is evaluated and exported at the end
    ema_decay: float = 0.999
    swa_fraction: float = 0.25  # share of the steps, the last ones, whose weights are averaged
    on_bad_step: BadStep = BadStep.stop  # gradient not finite, or a spike
    spike_factor: float | None = None  # a norm above this multiple of the usual one is a spike


@dataclass
class DistillationConfig:
    """Teachers whose mean prediction the model learns beside the text."""

    teachers: list[str] = field(default_factory=list)  # run folders; none: plain training
    share: float = 0.5  # of the loss, in (0, 1]


class Parallel(enum.Enum):
    ddp = "ddp"  # a whole model on every rank
    fsdp = "fsdp"  # parameters, gradients and optimiser states sharded (FSDP2)


class Dtype(enum.Enum):
    auto = "auto"  # bfloat16 on CUDA, float32 on CPU
    float32 = "float32"
    bfloat16 = "bfloat16"


class Recompute(enum.Enum):
    """See ``trainer/parallel/activation_checkpointing.py``."""

    auto = "auto"  # the cheapest that fits the memory
    none = "none"
    selective = "selective"
    full = "full"


@dataclass
class RuntimeConfig:
    """The machine's side of a run; nothing here changes what is learnt."""

    device: str = "auto"  # cuda where there is one, else cpu
    dtype: Dtype = Dtype.auto
    compile: bool | None = None  # torch.compile the blocks; null: on CUDA only
    parallel: Parallel = Parallel.ddp
    shard_size: int | None = None  # fsdp only: ranks that share one copy of the model; null: all
    context_parallel: int = 1  # ranks that share one window, see trainer/parallel
    recompute: Recompute = Recompute.auto  # what the backward pass computes again
    attention: str = "auto"  # backend of kernels.varlen_attention
    loss: str = "torch"  # backend of kernels.linear_cross_entropy: torch or triton
    loss_memory: str = "fast"  # or lean: in 128 MiB, a fourth matrix product
    threads: int | None = None  # CPU threads of one process


@dataclass
class TrackingConfig:
    """Where metrics go besides the console and ``metrics.jsonl``."""

    tensorboard: bool = True
    wandb_project: str | None = None
    trackio_project: str | None = None
    log_every: int = 10  # steps
    evaluations: int = 20  # spread evenly over the run; the last one is the result
    checkpoints: int = 20  # spread evenly over the run
    keep_checkpoints: int = 2


@dataclass
class TrainConfig:
    """One training run."""

    data: DataConfig = field(default_factory=DataConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    seed: int = 0  # initialisation (the data order has data.seed)
    initial_weights: str | None = None  # Hugging Face Llama folder to start from; null: random
    output: str = "runs"  # folder that holds the run folders
    name: str | None = None  # run folder; null: recipe and a hash of the config

    def check(self) -> None:
        """Raise ValueError for values that cannot work, before anything is read or written."""
        self.model.check()
        data, recipe, optimizer = self.data, self.recipe, self.optimizer
        if data.context_length < 2:
            raise ValueError(
                f"data.context_length={data.context_length} must be at least 2: a window of one "
                "token has nothing to predict"
            )
        if not 0 <= recipe.mixing_fraction < 1:
            raise ValueError(
                f"recipe.mixing_fraction={recipe.mixing_fraction} must be in [0, 1): the length of "
                "a run is epochs over the real stream / (1 - w), endless at w = 1; to train on one "
                "stream alone set recipe.base to it and leave recipe.stream empty"
            )
        if (recipe.stream is None) != (recipe.mixing_fraction == 0):
            raise ValueError(
                f"recipe.stream={recipe.stream} and recipe.mixing_fraction="
                f"{recipe.mixing_fraction} do not fit: a synthetic stream needs a fraction above "
                "0, real-only training needs both to be absent (null and 0)"
            )
        if recipe.stream is not None and recipe.generations < 1:
            raise ValueError(
                f"recipe.generations={recipe.generations} must be at least 1 for the "
                f"{recipe.stream} stream"
            )
        if recipe.max_generations is not None and recipe.max_generations < 1:
            raise ValueError(f"recipe.max_generations={recipe.max_generations} must be at least 1")
        runtime = self.runtime
        for name, chosen, choices in (
            ("runtime.attention", runtime.attention, ("auto", *ATTENTION_BACKENDS)),
            ("runtime.loss", runtime.loss, ("torch", "triton")),
            ("runtime.loss_memory", runtime.loss_memory, ("fast", "lean")),
        ):
            if chosen not in choices:
                raise ValueError(f"{name}={chosen} is not one of {', '.join(choices)}")
        for name, value in (
            ("recipe.epochs", recipe.epochs),
            ("recipe.learning_rate", recipe.learning_rate),
            ("data.batch_size", data.batch_size),
            ("tracking.log_every", self.tracking.log_every),
            ("tracking.evaluations", self.tracking.evaluations),
            ("tracking.checkpoints", self.tracking.checkpoints),
            ("tracking.keep_checkpoints", self.tracking.keep_checkpoints),
            ("runtime.context_parallel", runtime.context_parallel),
            ("optimizer.clip_norm", optimizer.clip_norm),
            ("optimizer.eps", optimizer.eps),
            ("data.micro_batch_size", data.micro_batch_size),
            ("runtime.shard_size", runtime.shard_size),
            ("runtime.threads", runtime.threads),
        ):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be above 0")
        for name, value in (
            ("recipe.weight_decay", recipe.weight_decay),
            ("data.seed", data.seed),
        ):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must not be negative")
        for name, value in (
            ("optimizer.warmup_fraction", optimizer.warmup_fraction),
            ("optimizer.decay_fraction", optimizer.decay_fraction),
            ("optimizer.min_ratio", optimizer.min_ratio),
        ):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must be in [0, 1]")
        for name, value in (
            ("optimizer.beta1", optimizer.beta1),
            ("optimizer.beta2", optimizer.beta2),
            ("optimizer.muon_momentum", optimizer.muon_momentum),
        ):
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value} must be in [0, 1)")
        for name, value in (
            ("optimizer.ema_decay", optimizer.ema_decay),
            ("optimizer.swa_fraction", optimizer.swa_fraction),
            ("distillation.share", self.distillation.share),
        ):
            if not 0 < value <= 1:
                raise ValueError(f"{name}={value} must be in (0, 1]")
        if optimizer.spike_factor is not None and not optimizer.spike_factor > 1:
            raise ValueError(f"optimizer.spike_factor={optimizer.spike_factor} must be above 1")
        chunks = 2 * runtime.context_parallel
        if chunks > 2 and data.context_length % chunks:
            raise ValueError(
                f"data.context_length={data.context_length} must be a multiple of {chunks}: "
                f"runtime.context_parallel={runtime.context_parallel} ranks cut a window into two "
                "chunks each"
            )
        if runtime.shard_size is not None and runtime.parallel is not Parallel.fsdp:
            raise ValueError(
                f"runtime.shard_size={runtime.shard_size} needs runtime.parallel=fsdp: ddp keeps "
                "a whole model on every rank"
            )

    def learnt(self) -> dict[str, Any]:
        """The part that decides what is learnt: without output, tracking and the machine's side."""
        learnt = to_dict(self)
        for key in ("runtime", "tracking", "output", "name"):
            learnt.pop(key)
        if self.initial_weights is None:
            learnt.pop("initial_weights")  # runs have the names they had before there was this key
        learnt["recipe"]["generations"] = self.recipe.used_generations
        learnt["recipe"].pop("max_generations")
        learnt["data"].pop("micro_batch_size")
        learnt["data"].pop("cache")
        return learnt

    def identity(self) -> str:
        """Hash of what is learnt, 8 hexadecimal digits: one experiment has one name everywhere."""
        return hashlib.sha256(json.dumps(self.learnt(), sort_keys=True).encode()).hexdigest()[:8]

    def run_dir(self) -> Path:
        """The run's folder, the same on every rank because it depends on the config alone."""
        label = self.recipe.synthetic or self.recipe.base
        return Path(self.output) / (self.name or f"{label}-{self.identity()}")


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The config as plain JSON types, numbers in the types of the schema."""
    content = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(content, dict)
    return content  # type: ignore[return-value]


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the resolved config as YAML."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def load_config(path: Path) -> TrainConfig:
    """Read a config written by :func:`save_config`; unknown keys are an error."""
    merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.load(path))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, TrainConfig)
    return config
