"""What a run reads, by content: the other half, beside its config, of what it is.

A stream that was built again has another content hash, and so has a run that reads it. Where a
folder or a bucket lies does not matter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from trainer.config.schema import TrainConfig, load_config
from trainer.data.format import remembered_hashes
from trainer.data.mds import read_stream_manifest
from trainer.files import read_object
from trainer.run.progress import newest_checkpoint, read_progress

COPY_AGAIN = "copy the folder that initial_weights names again"


def read_inputs(config: TrainConfig) -> dict[str, str]:
    """Content hashes, by name, of what a run reads: streams, teachers, the weights it starts from.

    Raises:
        FileNotFoundError: a stream or the weights are not there, or a teacher has no checkpoint.
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
    if config.initial_weights is not None:
        inputs["initial_weights"] = weights_identity(Path(config.initial_weights))
    return inputs


def weights_identity(folder: Path) -> str:
    """Hash of a Llama folder's weights; the folder may lie anywhere.

    Raises:
        FileNotFoundError: weights are missing.
    """
    names = [file.name for file in weight_files(folder)]
    hashes = remembered_hashes(folder, names)
    return hashlib.sha256("".join(hashes[name] for name in names).encode()).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder that belong together: those of the index, or the one.

    Raises:
        FileNotFoundError: there are none, or one of the index is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_object(index, "weight_map", remedy=COPY_AGAIN)["weight_map"]
        names = sorted(set(weight_map.values()))
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
    if missing := [file.name for file in files if not file.exists()]:
        ours = (folder / "checkpoints").is_dir()
        remedy = f": it is a run; evaluate.py runs=[{folder}] export=FOLDER writes it so"
        raise FileNotFoundError(
            f"initial_weights={folder} lacks {', '.join(missing)}" + (remedy if ours else "")
        )
    return files


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


def training_data(config: TrainConfig, inputs: Mapping[str, str]) -> str:
    """Short identity of the training streams' content; empty where it is not known."""
    names = (config.recipe.real_stream, config.recipe.synthetic)
    known = [inputs.get(name, "") for name in names if name]
    return "+".join(content[:6] for content in known if content)


def changed_inputs(earlier: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What two runs read differently, as ``name: old -> new``; empty where nothing."""
    return ", ".join(
        f"{name}: {earlier.get(name, 'none')[:12]} -> {now.get(name, 'none')[:12]}"
        for name in {**earlier, **now}
        if earlier.get(name) != now.get(name)
    )


def learnt_hash(config: TrainConfig, inputs: Mapping[str, str]) -> str:
    """What a result and a checkpoint say of themselves, should their config be lost.

    The same before and after the streams are open, which tell the vocabulary.
    """
    return replace(config, model=replace(config.model, vocab_size=0)).science_hash(inputs)


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
