"""The schema of ``train.py``: every key a run can have, with its meaning, unit and bounds.

``conf/train/`` fills these dataclasses; nothing below ``train.py`` knows Hydra. Imports no torch,
so that a launcher or a report can read configs without it.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from trainer.config.estimate import TrainEstimate
from trainer.config.fields import Place, check_bounds, group, setting, size_in_bytes
from trainer.config.renamed import translated

VERSION = 2  # of the keys that decide what is learnt; part of the hash
ENOUGH_READ = 0.97  # of the epochs that are asked for; less is said
SEALED = "# sha256 of what follows: "  # first line of a stored config


MOST_PASSES = 100_000  # over a stream: more is a mistake, and planned for minutes


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

    root: str = setting(
        "data/pydoc", "Corpus folder written by generate.py, or its URL.", place=Place.anywhere
    )
    validation: str = setting(
        "val", "Held-out stream to evaluate on, by name or folder.", place=Place.anywhere
    )
    share: float = setting(
        1.0,
        "Share of the training documents that is read, chosen by a hash of the id: the same ones "
        "in every stream, and a larger share holds a smaller one.",
        above=0,
        at_most=1,
    )
    context_length: int = setting(
        4096, "Length of a window.", unit="tokens", at_least=2, at_most=10_000_000
    )
    batch_size: int = setting(
        64, "Windows in a step, over all ranks.", unit="windows", at_least=1, at_most=10_000_000
    )
    micro_batch_size: int | None = setting(
        None,
        "Windows in one forward pass of one rank; null: the rank's whole share of a step.",
        unit="windows",
        at_least=1,
    )
    mask: Mask = setting(
        Mask.none,
        "Which tokens see each other: all of a window, those of one document (a member of a "
        "megadoc), or those of one megadoc.",
    )
    packing: Packing = setting(
        Packing.whole,
        "How documents become windows: whole and packed anew each epoch, a stream cut anew each "
        "epoch, or cut once into windows whose order changes (the paper's).",
    )
    order_seed: int = setting(42, "Seed of the order of the documents.", at_least=0, at_most=10**18)
    cache: str | None = setting(
        None, "Local folder for the shards of a remote root; needed only then.", place=Place.here
    )
    cache_limit: str | None = setting(
        None,
        "What the shards of all streams may take in cache, such as 200gb; what does not fit is "
        "read sample by sample. null: what the disk holds.",
    )


@dataclass(frozen=True)
class Reading:
    """How held-out documents are read: in windows of this length, under this mask."""

    context_length: int
    mask: Mask

    @property
    def name(self) -> str:
        """As it stands in results, such as ``256-megadoc``."""
        return f"{self.context_length}-{self.mask.value}"


@dataclass
class EvaluationConfig:
    """How held-out documents are read, where that is not how training reads."""

    context_lengths: list[int] = setting(
        [],
        "Held-out documents are read in windows of each of these lengths; the first gives the "
        "run's loss. Empty: data.context_length.",
        unit="tokens",
        at_least=2,
        at_most=10_000_000,
    )
    masks: list[Mask] = setting(
        [],
        "And under each of these masks, the first for the run's loss. Empty: data.mask.",
    )


@dataclass
class RecipeConfig:
    """Stream, mixing fraction, epochs, learning rate and weight decay: what the paper tunes."""

    name: str = setting("real", "Label of the recipe in tables; decides nothing.")
    real_stream: str = setting("real", "The stream whose passes are counted as epochs.")
    stream: str | None = setting(
        None, "Kind of the synthetic stream mixed in (simple, stitched, latent, ...); null: none."
    )
    generations: int = setting(
        0, "G of the synthetic stream: generations a document.", unit="generations", at_least=0
    )
    mixing_fraction: float = setting(
        0.0, "w: share of the tokens that comes from the synthetic stream.", at_least=0, below=1
    )
    epochs: float = setting(
        16.0, "Passes over the real stream.", unit="epochs", above=0, at_most=MOST_PASSES
    )
    learning_rate: float = setting(3e-3, "Peak learning rate.", above=0)
    weight_decay: float = setting(1.6, "Decoupled weight decay (AdamW).", at_least=0)
    max_generations: int | None = setting(
        None, "A smaller scale's cap on generations.", unit="generations", at_least=1
    )

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


@dataclass
class ModelConfig:
    """Shape of the decoder; the paper's four sizes lie in ``conf/train/model/``."""

    hidden_size: int = setting(
        768, "Width of the residual stream.", unit="channels", at_least=2, at_most=1_000_000
    )
    intermediate_size: int = setting(
        2688, "Width of the MLP.", unit="channels", at_least=1, at_most=10_000_000
    )
    num_layers: int = setting(12, "Blocks of attention and MLP.", at_least=1, at_most=10_000)
    num_heads: int = setting(12, "Query heads.", at_least=1)
    num_kv_heads: int = setting(12, "Key and value heads; fewer than num_heads: GQA.", at_least=1)
    vocab_size: int = setting(
        0, "Rows of the embeddings; 0: as the tokenizer.", at_least=0, at_most=10_000_000
    )
    rope_theta: float = setting(
        10_000.0, "Base of the rotary position embedding.", above=0, at_most=1e12
    )
    norm_eps: float = setting(1e-5, "Epsilon of the RMS norms.", above=0, at_most=1)
    init_std: float = setting(
        0.02, "Standard deviation of the initial weights.", above=0, at_most=10
    )
    dropout: float = setting(
        0.0, "Dropout on the output of every attention and MLP block.", at_least=0, below=1
    )

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_heads

    def check(self) -> None:
        """Raise ValueError where the shapes do not fit together."""
        check_bounds(self, "model.")
        if self.hidden_size % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} must be an even multiple of "
                f"model.num_heads={self.num_heads}: rotary embeddings turn pairs of channels"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} must be a multiple of "
                f"model.num_kv_heads={self.num_kv_heads} (grouped-query attention)"
            )

    def parameter_count(self) -> int:
        """All parameters, both embeddings included."""
        kv_size = self.num_kv_heads * self.head_dim
        attention = 2 * self.hidden_size * (self.hidden_size + kv_size)
        mlp = 3 * self.hidden_size * self.intermediate_size
        blocks = self.num_layers * (attention + mlp + 2 * self.hidden_size)
        return blocks + self.hidden_size + 2 * self.vocab_size * self.hidden_size


class ScheduleKind(enum.Enum):
    """Shape of the learning rate over a run, after its warm-up."""

    cosine = "cosine"
    wsd = "wsd"  # warm up, hold, decay linearly


class OptimizerKind(enum.Enum):
    """What steps the weights."""

    adamw = "adamw"
    muon = "muon"  # Muon for the matrices inside the blocks, AdamW for the rest


class DecaySchedule(enum.Enum):
    """Weight decay over a run."""

    constant = "constant"
    linear = "linear"  # falls to 0 at the end of the run


class Averaging(enum.Enum):
    """Average of the weights that is evaluated and exported."""

    none = "none"
    ema = "ema"
    swa = "swa"


class BadStep(enum.Enum):
    """What happens at a gradient that is not finite, or at a spike."""

    stop = "stop"
    skip = "skip"


@dataclass
class OptimizerConfig:
    """Optimiser and schedules (defaults: the paper's), averages of the weights, bad steps."""

    kind: OptimizerKind = setting(
        OptimizerKind.adamw, "AdamW, or Muon for the matrices inside the blocks."
    )
    beta1: float = setting(0.9, "AdamW: decay of the mean of the gradient.", at_least=0, below=1)
    beta2: float = setting(0.95, "AdamW: decay of the mean of its square.", at_least=0, below=1)
    eps: float = setting(1e-8, "AdamW: added to the denominator.", above=0)
    muon_momentum: float = setting(0.95, "Muon: Nesterov momentum.", at_least=0, below=1)
    max_grad_norm: float = setting(1.0, "Gradients of a larger norm are scaled to it.", above=0)
    schedule: ScheduleKind = setting(
        ScheduleKind.cosine, "Learning rate after the warm-up: cosine, or hold and decay (wsd)."
    )
    warmup_fraction: float = setting(
        0.01, "Share of the steps in which the rate rises.", at_least=0, at_most=1
    )
    lr_decay_fraction: float = setting(
        0.2, "wsd: share of the steps in the final decay.", at_least=0, at_most=1
    )
    min_lr_ratio: float = setting(
        0.0, "Learning rate at the end, as a share of the peak.", at_least=0, at_most=1
    )
    weight_decay_schedule: DecaySchedule = setting(
        DecaySchedule.constant, "Weight decay over the run: constant, or linear to 0 at its end."
    )
    decay_embeddings: bool = setting(False, "Decay the input embedding too; the paper exempts it.")
    averaging: Averaging = setting(
        Averaging.none, "Average of the weights that is evaluated and exported at the end."
    )
    ema_decay: float = setting(0.999, "ema: weight of the past in a step.", above=0, at_most=1)
    swa_fraction: float = setting(
        0.25, "swa: share of the steps, the last ones, that are averaged.", above=0, at_most=1
    )
    on_bad_step: BadStep = setting(
        BadStep.stop, "At a gradient that is not finite, or a spike: stop, or skip the step."
    )
    spike_factor: float | None = setting(
        None,
        "A gradient norm above this multiple of the usual one is a spike; null: none is.",
        above=1,
    )


@dataclass
class DistillationConfig:
    """Teachers whose mean prediction the model learns beside the text."""

    teachers: list[str] = setting(
        [], "Run folders of the teachers; empty: plain training.", place=Place.here
    )
    alpha: float = setting(0.5, "Share of the teachers in the loss.", above=0, at_most=1)


class Parallel(enum.Enum):
    """How the model lies on the ranks."""

    ddp = "ddp"  # a whole model on every rank
    fsdp = "fsdp"  # parameters, gradients and optimiser states sharded (FSDP2)


class Dtype(enum.Enum):
    """Dtype of the activations."""

    auto = "auto"  # bfloat16 on CUDA, float32 on CPU
    float32 = "float32"
    bfloat16 = "bfloat16"


class ActivationCheckpointing(enum.Enum):
    """See ``trainer/parallel/activation_checkpointing.py``."""

    auto = "auto"  # the cheapest that fits the memory
    none = "none"
    selective = "selective"
    full = "full"


class AttentionBackend(enum.Enum):
    """Backends of ``kernels.varlen_attention``."""

    auto = "auto"
    cudnn = "cudnn"
    flash = "flash"
    flash_attn = "flash_attn"
    flex = "flex"
    triton = "triton"
    gluon = "gluon"
    gluon_split = "gluon_split"
    torch = "torch"
    reference = "reference"


class LossBackend(enum.Enum):
    """Backends of ``kernels.linear_cross_entropy``."""

    auto = "auto"
    torch = "torch"
    triton = "triton"


class LossMemory(enum.Enum):
    """What the loss trades for memory."""

    fast = "fast"
    lean = "lean"


@dataclass
class RuntimeConfig:
    """The machine's side of a run; nothing here changes what is learnt."""

    device: str = setting("auto", "cuda, cpu, or auto: cuda where there is one.")
    dtype: Dtype = setting(Dtype.auto, "Of the activations; auto: bfloat16 on CUDA, else float32.")
    compile: bool | None = setting(None, "torch.compile the blocks; null: on CUDA only.")
    parallel: Parallel = setting(
        Parallel.ddp, "A whole model on every rank (ddp), or everything sharded (fsdp)."
    )
    shard_size: int | None = setting(
        None, "fsdp: ranks that share one copy of the model; null: all.", unit="ranks", at_least=1
    )
    context_parallel: int = setting(1, "Ranks that share one window.", unit="ranks", at_least=1)
    activation_checkpointing: ActivationCheckpointing = setting(
        ActivationCheckpointing.auto,
        "What the backward pass computes again; auto: as little as the memory allows.",
    )
    attention_backend: AttentionBackend = setting(
        AttentionBackend.auto, "Of kernels.varlen_attention; auto: the fastest that is right here."
    )
    loss_backend: LossBackend = setting(
        LossBackend.auto, "Of kernels.linear_cross_entropy; auto: the fastest that is right here."
    )
    loss_memory: LossMemory = setting(
        LossMemory.fast, "lean: the loss works in 128 MiB, for a fourth matrix product."
    )
    deterministic: bool = setting(
        False, "Only attention whose gradients have the same bits in every run."
    )
    num_threads: int | None = setting(
        None,
        "CPU threads of one process; null: PyTorch's choice.",
        unit="threads",
        at_least=1,
        at_most=4096,
    )


@dataclass
class TrackingConfig:
    """Where metrics go besides the console and ``metrics.jsonl``."""

    tensorboard: bool = setting(True, "Write TensorBoard scalars into the run folder.")
    wandb_project: str | None = setting(None, "Weights & Biases project; null: none.")
    trackio_project: str | None = setting(None, "Trackio project; null: none.")
    log_every: int = setting(10, "Steps between two log lines.", unit="steps", at_least=1)
    num_evaluations: int = setting(
        20, "Evaluations, spread evenly over the run; the last one is the result.", at_least=1
    )


@dataclass
class CheckpointConfig:
    """When a run is saved."""

    count: int = setting(20, "Checkpoints, spread evenly over the run.", at_least=1)
    minutes: float | None = setting(
        None, "Also save when this long has passed; null: never.", unit="minutes", above=0
    )
    keep: int = setting(2, "The newest so many stay on the disk.", at_least=1)


@dataclass
class TrainConfig:
    """One training run."""

    data: DataConfig = group(DataConfig, "Where the streams lie and how they become batches.")
    evaluation: EvaluationConfig = group(
        EvaluationConfig, "How held-out documents are read, where not as in training."
    )
    recipe: RecipeConfig = group(RecipeConfig, "What is read how often, and how fast it is learnt.")
    model: ModelConfig = group(ModelConfig, "Shape of the decoder.")
    optimizer: OptimizerConfig = group(
        OptimizerConfig, "Optimiser, schedules, averages, bad steps."
    )
    distillation: DistillationConfig = group(
        DistillationConfig, "Teachers whose mean prediction is learnt beside the text."
    )
    runtime: RuntimeConfig = group(
        RuntimeConfig, "The machine's side of a run; nothing here changes what is learnt."
    )
    tracking: TrackingConfig = group(
        TrackingConfig, "Where metrics go besides the console and metrics.jsonl."
    )
    checkpoint: CheckpointConfig = group(CheckpointConfig, "When a run is saved.")
    estimate: TrainEstimate = group(
        TrainEstimate, "estimate=true says what the run will cost, and trains nothing."
    )
    seed: int = setting(
        0,
        "Of initialisation and dropout (the order has data.order_seed).",
        at_least=0,
        at_most=10**18,
    )
    initial_weights: str | None = setting(
        None, "Hugging Face Llama folder to start from; null: random weights.", place=Place.here
    )
    output: str = setting("runs", "Folder that holds the run folders.", place=Place.here)
    name: str | None = setting(None, "Run folder; null: the recipe and a hash of the config.")

    def check(self) -> None:
        """Raise ValueError for values that cannot work, before anything is read or written."""
        check_bounds(self)
        size_in_bytes(self.data.cache_limit, "data.cache_limit")
        self.model.check()
        if self.name is not None and (self.name in ("", ".", "..") or "/" in self.name):
            raise ValueError(
                f"name={self.name!r} must be the name of a folder inside output={self.output}; "
                "leave it out for one by recipe and config"
            )
        if not self.output:
            raise ValueError("output='' must be a folder for the runs, such as output=runs")
        data, recipe, runtime = self.data, self.recipe, self.runtime
        if (recipe.stream is None) != (recipe.mixing_fraction == 0):
            raise ValueError(
                f"recipe.stream={recipe.stream} and recipe.mixing_fraction="
                f"{recipe.mixing_fraction} do not fit: a synthetic stream needs a fraction above "
                "0, real-only training needs both to be absent (null and 0); to train on one "
                "stream alone set recipe.real_stream to it"
            )
        if recipe.stream is not None and recipe.generations < 1:
            raise ValueError(
                f"recipe.generations={recipe.generations} must be at least 1 for the "
                f"{recipe.stream} stream"
            )
        chunks = 2 * runtime.context_parallel
        for name, context in (
            ("data.context_length", data.context_length),
            *(("evaluation.context_lengths", one) for one in self.evaluation.context_lengths),
        ):
            if chunks > 2 and context % chunks:
                raise ValueError(
                    f"{name}={context} must be a multiple of {chunks}: "
                    f"runtime.context_parallel={runtime.context_parallel} ranks cut a window into "
                    "two chunks each"
                )
        if runtime.shard_size is not None and runtime.parallel is not Parallel.fsdp:
            raise ValueError(
                f"runtime.shard_size={runtime.shard_size} needs runtime.parallel=fsdp: ddp keeps "
                "a whole model on every rank"
            )

    @property
    def readings(self) -> list[Reading]:
        """How held-out documents are read, the one that gives the run's loss first."""
        contexts = self.evaluation.context_lengths or [self.data.context_length]
        masks = self.evaluation.masks or [self.data.mask]
        return [Reading(context, mask) for mask in masks for context in contexts]

    def science(self) -> dict[str, Any]:
        """The config's part of what decides the weights: not output, tracking and the machine.

        Nor where the streams lie: ``trainer/run/inputs.py`` says what is in them.
        """
        science = to_dict(self)
        for key in ("runtime", "tracking", "checkpoint", "estimate", "output", "name"):
            science.pop(key)
        science["recipe"]["generations"] = self.recipe.used_generations
        science["recipe"].pop("max_generations")
        for key in ("micro_batch_size", "cache", "cache_limit", "root"):
            science["data"].pop(key)
        # What was not there once leaves the names of runs as they are.
        if self.data.share == 1:
            science["data"].pop("share")
        if self.evaluation == EvaluationConfig():
            science.pop("evaluation")
        # What they hold is among the inputs.
        science["initial_weights"] = self.initial_weights is not None or None
        science["distillation"]["teachers"] = [None] * len(self.distillation.teachers)
        science["version"] = VERSION
        return science

    def science_hash(self, inputs: Mapping[str, str]) -> str:
        """Hash of what decides the weights, 8 hexadecimal digits: an experiment has one name.

        Args:
            inputs: identity of everything that is read, by name: ``trainer/run/inputs.py``.
        """
        content = json.dumps([self.science(), dict(inputs)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:8]


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The config as plain JSON types, numbers in the types of the schema."""
    content = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(content, dict)
    return content  # type: ignore[return-value]


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the resolved config as YAML, its hash in the first line."""
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    path.write_text(f"{SEALED}{hash_text(text)}\n{text}")


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def load_config(path: Path) -> TrainConfig:
    """Read a config written by :func:`save_config`, of this version or an older one.

    Raises:
        ValueError: damage, unknown keys, or values of another type; names the file.
    """
    try:
        first, _, rest = path.read_text().partition("\n")
        if first.startswith(SEALED) and first != f"{SEALED}{hash_text(rest)}":
            raise ValueError("it was changed after it was written")
        if not first:
            raise ValueError("it is empty")
        stored = translated(OmegaConf.to_container(OmegaConf.load(path)))
        merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), stored)
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no config of this program, or damaged ({error}); where train.py wrote it, "
            "delete it and start the same command again: it is written anew"
        ) from None
    config = OmegaConf.to_object(merged)
    assert isinstance(config, TrainConfig)
    return config
