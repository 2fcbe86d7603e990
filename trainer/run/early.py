"""What can be known before the model is built is checked there, and leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

from trainer.config.schema import ENOUGH_READ, MOST_PASSES, TrainConfig
from trainer.data.batches import check_batch
from trainer.data.mds import MegadocStream
from trainer.data.plan import Plan
from trainer.data.remote import tokenizer_folder
from trainer.files import check_writable
from trainer.parallel.ranks import Ranks
from trainer.run.distillation import check_teachers
from trainer.run.export import check_hugging_face
from trainer.run.progress import checkpoints
from trainer.run.trackers import check_trackers


def check_early(config: TrainConfig, stream: MegadocStream, run_dir: Path, ranks: Ranks) -> None:
    """Raise ValueError or OSError for what would end the run after the model is built.

    Args:
        config: of the run, its vocabulary known.
        stream: the first training stream.
        run_dir: of the run.
        ranks: all of them.
    """
    data = config.data
    check_memory(config)
    check_batch(data.batch_size, ranks.data_size, data.micro_batch_size)
    check_trackers(config.tracking)
    check_writable(run_dir, "output=... to a folder for the runs")
    check_teachers(config.distillation.teachers, stream)
    if config.initial_weights is not None and not checkpoints(run_dir):
        tokenizer = tokenizer_folder(data.root, data.cache) / "tokenizer.json"
        check_hugging_face(config.model, Path(config.initial_weights), tokenizer)


def check_memory(config: TrainConfig) -> None:
    """Raise ValueError where the parameters alone, built on the host, do not fit into it."""
    needed = 4 * config.model.parameter_count()
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(
            f"model=... has {config.model.parameter_count():,} parameters, {needed / 1e9:,.0f} GB, "
            f"and this machine {there / 1e9:,.0f} GB of memory; choose a smaller model"
        )


def check_passes(config: TrainConfig, streams: list[MegadocStream]) -> None:
    """Raise ValueError where a mixing fraction reads the synthetic stream absurdly often."""
    recipe = config.recipe
    for stream in streams[1:]:
        ratio = recipe.mixing_fraction / (1 - recipe.mixing_fraction)
        tokens = recipe.epochs * streams[0].manifest.tokens * ratio
        if (passes := tokens / stream.manifest.tokens) > MOST_PASSES:
            raise ValueError(
                f"recipe.mixing_fraction={recipe.mixing_fraction} reads {stream.manifest.name} "
                f"{passes:,.0f} times while {streams[0].manifest.name} is read {recipe.epochs:g} "
                "times; make one of them smaller"
            )


def describe_reading(plan: Plan, epochs: float, steps: int) -> str | None:
    """What the last partial batch leaves unread, and a batch that leaves less; None if little."""
    read = plan.epochs_seen(steps)[0]
    if read > ENOUGH_READ * epochs:
        return None
    text = (
        f"{plan.sources[0].name}: {epochs:g} epochs asked, {read:.2f} read in {steps} steps: the "
        "last, partial batch is left out"
    )
    smaller = int(plan.batch_size * (steps / (steps + 1)) * epochs / read)
    while 0 < smaller < plan.batch_size:
        other = Plan(plan.sources, plan.context_length, smaller, plan.packing, plan.seed)
        if (better := other.epochs_seen(other.steps(epochs))[0]) > read:
            return f"{text}; data.batch_size={smaller} reads {better:.2f}"
        smaller = smaller * 3 // 4
    return text


def describe_overlap(training: list[MegadocStream], validation: MegadocStream) -> str | None:
    """A warning where the model is evaluated on what it is trained on."""
    held_out = validation.manifest
    for stream in training:
        if stream.manifest.content_sha256 == held_out.content_sha256:
            return (
                f"data.validation={held_out.name} is the training stream "
                f"{stream.manifest.name}; its loss says nothing about other text"
            )
    return None
