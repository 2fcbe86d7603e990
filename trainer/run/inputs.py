"""What a run reads, by content: the other half, beside its config, of what it is.

A stream that was built again has another content hash, and so has a run that reads it. Where a
folder or a bucket lies does not matter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from trainer.config.schema import TrainConfig, load_config
from trainer.data.mds import read_stream_manifest
from trainer.run.progress import newest_checkpoint, read_progress


def read_inputs(config: TrainConfig) -> dict[str, str]:
    """Content hashes, by name, of all streams of a run, and the identities of its teachers.

    Raises:
        FileNotFoundError: a stream is not there, or a teacher has no checkpoint.
        ValueError: a manifest is damaged, or of an older version.
    """
    names = [config.recipe.real_stream, config.recipe.synthetic, config.data.validation]
    inputs = {
        name: read_stream_manifest(stream_path(config, name)).content_sha256
        for name in names
        if name
    }
    for place, teacher in enumerate(config.distillation.teachers):
        inputs[f"distillation.teachers[{place}]"] = checkpoint_identity(teacher)
    return inputs


def stream_path(config: TrainConfig, name: str) -> str:
    """Folder of a stream of the corpus."""
    return f"{config.data.root}/streams/{name}"


def checkpoint_identity(run: str | Path) -> str:
    """Hash of what the newest checkpoint of a run, or a checkpoint folder, has learnt."""
    checkpoint = newest_checkpoint(run)
    progress = read_progress(checkpoint)
    config = load_config(checkpoint.parent.parent / "config.yaml")
    content = [config.science(), progress.inputs, progress.step]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def changed_inputs(earlier: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What two runs read differently, as ``name: old -> new``; empty where nothing."""
    return ", ".join(
        f"{name}: {earlier.get(name, 'none')[:12]} -> {now.get(name, 'none')[:12]}"
        for name in {**earlier, **now}
        if earlier.get(name) != now.get(name)
    )


def run_dir_of(config: TrainConfig, inputs: Mapping[str, str] | None = None) -> Path:
    """The run's folder: ``name``, or the recipe and a hash of what is learnt.

    Args:
        config: of the run.
        inputs: what it reads; None to look.
    """
    if config.name:
        return Path(config.output) / config.name
    label = config.recipe.synthetic or config.recipe.real_stream
    identity = config.science_hash(read_inputs(config) if inputs is None else inputs)
    return Path(config.output) / f"{label}-{identity}"
