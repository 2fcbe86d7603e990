"""Everything a training run needs before its first step: data, model, optimiser, and where an
earlier attempt stopped.

Read :func:`build_run` top to bottom. What can be known to be wrong is refused before the model is
built, and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from trainer.config.fields import size_in_bytes
from trainer.config.schema import ActivationCheckpointing, Averaging, Parallel, TrainConfig
from trainer.data.batches import BatchLoader, PackedBatch
from trainer.data.mds import MegadocStream, check_same_tokenizer
from trainer.data.packing import pack_whole
from trainer.data.plan import Plan, Position, Source
from trainer.data.remote import tokenizer_folder
from trainer.model.llama import Llama
from trainer.optim.averaging import WeightAverage
from trainer.optim.bad_steps import StepGuard
from trainer.optim.optimizer import build_optimizers
from trainer.parallel.activation_checkpointing import choose_recompute, recompute_blocks
from trainer.parallel.ranks import Ranks, parallelize
from trainer.run.checkpoint import Checkpointer, load_checkpoint, newest_whole
from trainer.run.distillation import Teachers
from trainer.run.early import check_early, check_passes, describe_overlap, describe_reading
from trainer.run.export import load_hugging_face
from trainer.run.inputs import changed_inputs, learnt_hash, stream_path
from trainer.run.kernel_choice import choose_kernels, compute_dtype
from trainer.run.progress import Progress, checkpoints, read_progress
from trainer.run.run_dir import check_progress, claimed

logger = logging.getLogger(__name__)

FULL = 0.97  # density of the windows below which we say how to raise it


@dataclass
class Run:
    """A run that is ready for its next step, on one rank."""

    config: TrainConfig  # with the tokenizer's vocabulary
    folder: Path
    inputs: dict[str, str]  # content hashes of the streams
    ranks: Ranks
    streams: list[MegadocStream]  # the real one, then the synthetic one
    validation: MegadocStream
    plan: Plan
    steps: int  # of the whole run
    model: Llama
    wrapped: nn.Module  # the model as DDP or FSDP has it; calls go through it
    optimizers: list[torch.optim.Optimizer]
    average: WeightAverage | None
    teachers: Teachers | None
    guard: StepGuard
    before: Progress  # where the attempt before stopped
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Training time so far, over all attempts."""
        return self.before.seconds + time.monotonic() - self.began

    def progress(self, done: int) -> Progress:
        """What the checkpoint after ``done`` steps says of itself."""
        return Progress(
            done,
            self.plan.hash(),
            self.streams[0].manifest.tokenizer_sha256,
            self.seconds,
            **self.guard.state(),
            inputs=self.inputs,
            identity=learnt_hash(self.config, self.inputs),
            position=asdict(self.plan.position(done)),
        )

    def checkpointer(self) -> Checkpointer:
        """Writes the run's checkpoints."""
        keep = self.config.checkpoint.keep
        return Checkpointer(
            self.folder, self.wrapped, self.optimizers, self.average, self.ranks, keep
        )

    def loader(self) -> BatchLoader:
        """The batches that are left, this rank's part of each."""
        return batches(
            self.config, self.plan, self.streams, self.ranks, self.before.step, self.steps
        )


def build_run(
    config: TrainConfig,
    inputs: dict[str, str],
    folder: Path,
    ranks: Ranks,
    cleanup: contextlib.ExitStack,
) -> Run:
    """Open the streams, plan the order of the data, build and load what is trained.

    Args:
        config: the run.
        inputs: content hashes of the streams, as they were when the folder was named.
        folder: the run folder; held alone until ``cleanup`` closes.
        ranks: all of them call this together.
        cleanup: lets go of the run folder.

    Raises:
        ValueError: the config, the streams or an earlier attempt in the same folder do not fit.
    """
    # The data: streams, and a plan that says which document is read when.
    streams = open_streams(config)
    validation = open_stream(config, config.data.validation)
    for stream in (*streams, validation):
        cleanup.callback(stream.close)
    check_same_tokenizer([*streams, validation])
    for stream in (*streams, validation):
        check_unchanged(stream, inputs)
    vocabulary = model_vocabulary(config, streams[0])
    config = replace(config, model=replace(config.model, vocab_size=vocabulary))
    check_passes(config, streams)
    plan = plan_data(config, streams)
    steps = plan.steps(config.recipe.epochs)
    check_early(config, streams[0], folder, ranks)
    if ranks.is_main:
        cleanup.enter_context(claimed(folder, config))
        logger.info(describe_data(streams, plan))
        if remark := describe_reading(plan, config.recipe.epochs, steps):
            logger.info(remark)
        if caution := describe_overlap(streams, validation):
            logger.warning(caution)

    # The model, its optimiser, and where an earlier attempt stopped.
    model = build_model(config, plan, streams, folder, ranks)
    wrapped = parallelize(model, ranks, config.runtime)
    optimizers = build_optimizers(model, config.optimizer, config.recipe)
    average = None
    if config.optimizer.averaging is not Averaging.none:
        average = WeightAverage(wrapped, config.optimizer, steps)
    teachers = Teachers(config.distillation, ranks) if config.distillation.teachers else None
    before = resume(config, folder, wrapped, optimizers, average, plan, streams[0], inputs, ranks)
    if ranks.is_main:
        check_progress(folder, before.step)
    return Run(
        config=config,
        folder=folder,
        inputs=inputs,
        ranks=ranks,
        streams=streams,
        validation=validation,
        plan=plan,
        steps=steps,
        model=model,
        wrapped=wrapped,
        optimizers=optimizers,
        average=average,
        teachers=teachers,
        guard=StepGuard(
            config.optimizer,
            before.usual_grad_norm,
            before.accepted_steps,
            before.skipped_steps,
            before.skipped_in_a_row,
        ),
        before=before,
    )


def build_model(
    config: TrainConfig, plan: Plan, streams: list[MegadocStream], folder: Path, ranks: Ranks
) -> Llama:
    """The model on its device with the kernels it will use, blocks recomputed and compiled."""
    kernels = choose_kernels(config, partial(first_batch, config, plan, streams, ranks), ranks)
    model = Llama(config.model, config.seed, compute_dtype(config.runtime, ranks.device), kernels)
    if config.initial_weights is not None and not checkpoints(folder):
        tokenizer = tokenizer_folder(config.data.root, config.data.cache) / "tokenizer.json"
        load_hugging_face(model, Path(config.initial_weights), tokenizer)
    model.to(ranks.device)
    prepare_blocks(model, config, ranks)
    return model


def open_streams(config: TrainConfig) -> list[MegadocStream]:
    """The base stream and, when the recipe mixes one in, the synthetic stream."""
    names = [config.recipe.real_stream]
    if config.recipe.synthetic:
        names.append(config.recipe.synthetic)
    streams = [open_stream(config, name, as_needed=True) for name in names]
    if config.data.share < 1:
        for stream in streams:
            stream.keep_share(config.data.share)
    return streams


def open_stream(config: TrainConfig, name: str, as_needed: bool = False) -> MegadocStream:
    """A stream of the corpus folder by its name; a remote one as a whole, or as it is needed."""
    limit = size_in_bytes(config.data.cache_limit, "data.cache_limit")
    return MegadocStream(stream_path(config, name), config.data.cache, limit, as_needed)


def check_unchanged(stream: MegadocStream, inputs: Mapping[str, str]) -> None:
    """Raise ValueError where a stream was built again between naming the run and opening it."""
    if stream.manifest.content_sha256 not in inputs.values():
        raise ValueError(f"{stream.path} was built again just now; start the same command again")


def plan_data(config: TrainConfig, streams: list[MegadocStream]) -> Plan:
    """The order of the whole run as a pure function of the config and the lengths."""
    fraction = config.recipe.mixing_fraction
    shares = [1 - fraction, fraction][: len(streams)]
    return Plan(
        [
            Source(stream.manifest.name, stream.lengths, share)
            for stream, share in zip(streams, shares, strict=True)
        ],
        context_length=config.data.context_length,
        batch_size=config.data.batch_size,
        packing=config.data.packing.value,
        seed=config.data.order_seed,
    )


def describe_data(streams: list[MegadocStream], plan: Plan) -> str:
    """One line a stream: how much there is and how densely its windows are filled."""
    lines = []
    for stream, density in zip(streams, plan.density(), strict=True):
        lines.append(
            f"{stream.manifest.name}: {len(stream):,} samples, {stream.manifest.tokens:,} tokens, "
            f"windows {density:.1%} full"
        )
        if plan.packing == "whole" and density < FULL:
            lines.append(how_to_fill(stream.lengths, plan))
    return "\n".join(lines)


def how_to_fill(lengths: NDArray[np.int64], plan: Plan) -> str:
    """What makes the windows of these documents fuller."""
    for factor in (2, 4, 8):
        longer = factor * plan.context_length
        density = pack_whole(lengths, longer, np.random.default_rng(0)).density(longer)
        if density >= FULL and plan.batch_size % factor == 0:
            return (
                f"  Few documents fit together: data.context_length={longer} "
                f"data.batch_size={plan.batch_size // factor} fills {density:.1%} and,\n  unless "
                "data.mask=none, costs no attention beyond a document; data.packing=stream cuts "
                "documents instead."
            )
    return "  Few documents fit together; data.packing=stream cuts them to fill the windows."


def batches(
    config: TrainConfig,
    plan: Plan,
    streams: list[MegadocStream],
    ranks: Ranks,
    start_step: int,
    stop_step: int,
) -> BatchLoader:
    """Reads this rank's part of the batches of some steps."""
    return BatchLoader(
        plan,
        streams,
        config.data.mask,
        rank=ranks.data_rank,
        world_size=ranks.data_size,
        micro_batch_size=config.data.micro_batch_size,
        start_step=start_step,
        stop_step=stop_step,
    )


def first_batch(
    config: TrainConfig, plan: Plan, streams: list[MegadocStream], ranks: Ranks
) -> PackedBatch:
    """A micro-batch of the first step."""
    loader = batches(config, plan, streams, ranks, 0, 1)
    return loader.read(loader.windows(0))[0]


def model_vocabulary(config: TrainConfig, stream: MegadocStream) -> int:
    """The model's vocabulary: the tokenizer's unless the config asks for a larger one."""
    wanted, needed = config.model.vocab_size, stream.manifest.vocab_size
    if wanted and wanted < needed:
        raise ValueError(
            f"model.vocab_size={wanted} is smaller than the {needed} tokens of the tokenizer that "
            f"{stream.path} was written with; leave it at 0 to take the tokenizer's"
        )
    return wanted or needed


def prepare_blocks(model: Llama, config: TrainConfig, ranks: Ranks) -> None:
    """Recompute and compile block by block, so one compilation serves every layer."""
    windows = config.data.micro_batch_size or config.data.batch_size // ranks.data_size
    tokens = windows * config.data.context_length // ranks.context_parallel
    sharded = config.runtime.parallel is Parallel.fsdp
    shards = (config.runtime.shard_size or ranks.world_size) if sharded else 1
    mode = choose_recompute(config, tokens, shards, ranks.device)
    recompute_blocks(model, mode)
    if mode is not ActivationCheckpointing.none:
        logger.info(f"recomputing blocks in the backward pass: {mode.value}")
    if config.runtime.compile or (config.runtime.compile is None and ranks.device.type == "cuda"):
        for layer in model.model.layers:
            layer.compile()


def resume(
    config: TrainConfig,
    run_dir: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    average: WeightAverage | None,
    plan: Plan,
    stream: MegadocStream,
    inputs: Mapping[str, str],
    ranks: Ranks,
) -> Progress:
    """Load the newest checkpoint, if there is one, and say what was done."""
    newest = newest_whole(run_dir, ranks)
    if newest is None:
        return Progress(0, plan.hash(), stream.manifest.tokenizer_sha256, 0.0, inputs=dict(inputs))
    progress = read_progress(newest)
    if progress.tokenizer_sha256 != stream.manifest.tokenizer_sha256:
        raise ValueError(
            f"{newest} was trained with another tokenizer than {stream.path} was written with; "
            "use another name=... for the new corpus"
        )
    if changed := changed_inputs(progress.inputs, inputs):
        raise ValueError(
            f"{newest} was trained on other data than is there now ({changed}): streams under "
            f"{stream.path.parent} have changed since; use another name=... or rebuild the old ones"
        )
    if progress.identity not in ("", learnt_hash(config, inputs)):
        raise ValueError(
            f"{newest} was trained with another config, and the config.yaml that could say which "
            "is gone; use another name=..."
        )
    if progress.plan_hash != plan.hash():
        raise ValueError(
            f"{newest} was trained in another order of the same data: another version wrote it; "
            "use another name=..."
        )
    if progress.position is not None:
        plan.resume(Position(**progress.position))
    load_checkpoint(newest, model, optimizers, average, ranks)
    logger.info(f"resuming {run_dir} after step {progress.step}")
    return progress
