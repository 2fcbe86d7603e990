"""Hugging Face Llama folders: export of a trained run, and weights to start from."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from trainer.config.schema import ModelConfig, TrainConfig
from trainer.data.remote import tokenizer_folder
from trainer.files import (
    DamagedFileError,
    damaged,
    read_object,
    read_sealed,
    replace_folder,
    sha256,
)
from trainer.model.llama import Llama
from trainer.object_store import is_remote, is_there, send
from trainer.run.checkpoint import load_model
from trainer.run.inputs import COPY_AGAIN, weight_files
from trainer.run.progress import newest_checkpoint, read_progress

SHARD_BYTES = 4 << 30
SHAPE = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("vocab_size", "rms_norm_eps"),
)  # in the config.json of every Llama


def export_run(run: str | Path, where: str | Path) -> None:
    """Write a run as ``LlamaForCausalLM`` with sharded safetensors and its tokenizer.

    A folder appears when it is complete; ``config.json`` is sent last to an object store.

    Args:
        run: folder of the run, or a checkpoint of it.
        where: a new folder, or a URI.

    Raises:
        ValueError: there is something already, or the corpus folder has got another tokenizer
            since, or a damaged one.
        FileNotFoundError: the corpus folder with the tokenizer is gone.
        OSError: an object store cannot be reached, or not with these credentials.
    """
    if not is_remote(where):
        write_export(run, Path(where))
        return
    if is_there(f"{where}/config.json"):
        raise ValueError(f"export={where} is not empty; choose a new folder")
    with tempfile.TemporaryDirectory() as folder:
        write_export(run, Path(folder) / "export")
        send(Path(folder) / "export", str(where), "config.json")


def write_export(run: str | Path, folder: Path) -> None:
    """:func:`export_run` to a folder."""
    check_export(folder)
    trained = read_progress(newest_checkpoint(run)).tokenizer_sha256
    model, config = load_model(run)
    tokenizer = tokenizer_folder(config.data.root, config.data.cache)
    if not (tokenizer / "manifest.json").exists():
        raise FileNotFoundError(
            f"{tokenizer} holds no tokenizer: {run} was trained with data.root={config.data.root}; "
            "put that folder back"
        )
    manifest = read_sealed(tokenizer / "manifest.json")
    if trained != manifest["sha256"]:
        raise ValueError(
            f"{run} was trained with the tokenizer {trained[:12]}, {tokenizer} now holds "
            f"{manifest['sha256'][:12]}; put the old one back to export them together"
        )
    file = tokenizer / "tokenizer.json"
    if not file.exists() or sha256(file) != trained:
        raise DamagedFileError(
            f"{file} is missing or not the one that was written; put the old one back"
        )
    with replace_folder(folder) as unfinished:
        contents = {
            "config.json": hugging_face_config(config, manifest["eos_id"]),
            "generation_config.json": {"eos_token_id": manifest["eos_id"]},
            "tokenizer.json": plain_tokenizer(file),
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": manifest["eos_token"],
                "model_max_length": config.data.context_length,
                "clean_up_tokenization_spaces": False,
            },
        }
        for name, content in contents.items():
            text = json.dumps(content, indent=1, ensure_ascii=False)
            (unfinished / name).write_text(text, encoding="utf-8")
        save_shards(model.state_dict(), unfinished)
        for file in unfinished.glob("*.safetensors"):  # readable by its writer alone otherwise
            shutil.copymode(unfinished / "config.json", file)


def check_export(folder: Path) -> None:
    """Raise ValueError where something lies in ``folder`` already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"export={folder} is not empty; choose a new folder")


def plain_tokenizer(file: Path) -> dict[str, Any]:
    """A ``tokenizer.json`` that encodes a text as the streams were: it adds, cuts and pads nothing.

    What is left of the post-processor mends offsets alone.
    """
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    processor = content.get("post_processor") or {}
    parts = processor.get("processors", [processor])
    kept = [part for part in parts if part.get("type") == "ByteLevel"]
    content["post_processor"] = kept[0] if kept else None
    return content | {"truncation": None, "padding": None}


def hugging_face_config(config: TrainConfig, eos_id: int) -> dict[str, object]:
    """``config.json`` of a Llama."""
    model = config.model
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": config.data.context_length,
        "rope_theta": model.rope_theta,  # transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},  # 5
        "rms_norm_eps": model.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "torch_dtype": "float32",
    }


def save_shards(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Safetensors files of at most ``SHARD_BYTES`` and the index that joins them."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", {"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def check_hugging_face(config: ModelConfig, folder: Path, tokenizer: Path) -> bool:
    """Look at a Llama folder without loading it; returns whether its embeddings are tied.

    Args:
        config: the shape that is wanted.
        folder: with ``config.json`` and safetensors.
        tokenizer: ``tokenizer.json`` of the corpus; compared with the folder's where both exist.

    Raises:
        FileNotFoundError: the folder holds no config or no safetensors.
        ValueError: the model is not a plain Llama, or has another shape or tokenizer.
    """
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"initial_weights={folder} holds no config.json of a Llama")
    content = read_object(folder / "config.json", remedy=COPY_AGAIN)
    theirs = llama_shape(content, folder / "config.json")
    wanted = {key: value for key, value in theirs.items() if getattr(config, key) != value}
    if wanted:
        asked = " ".join(f"model.{key}={value}" for key, value in wanted.items())
        raise ValueError(f"initial_weights={folder} has another shape than model=...; add {asked}")
    own = folder / "tokenizer.json"
    if own.exists() and tokenizer.exists() and vocabulary(own) != vocabulary(tokenizer):
        raise ValueError(
            f"initial_weights={folder} was trained with another tokenizer than {tokenizer}; write "
            f"the corpus with tokenizer=file tokenizer.path={own}"
        )
    weight_files(folder)
    return bool(content.get("tie_word_embeddings"))


def load_hugging_face(model: Llama, folder: Path, tokenizer: Path) -> None:
    """Give ``model``, on the CPU, the weights of a Llama folder, exported here or elsewhere.

    Raises:
        ValueError: the files hold other tensors than a Llama's; and as :func:`check_hugging_face`.
    """
    tied = check_hugging_face(model.config, folder, tokenizer)
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        try:
            state |= load_file(file)
        except SafetensorError as error:
            raise DamagedFileError(damaged(file, str(error), COPY_AGAIN)) from error
    if tied and "model.embed_tokens.weight" in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    # Older versions of transformers stored what they compute from rope_theta.
    state = {name: own for name, own in state.items() if not name.endswith("rotary_emb.inv_freq")}
    wanted_names = model.state_dict().keys()
    for problem, names in (
        ("lacks", wanted_names - state.keys()),
        ("holds besides a Llama's", state.keys() - wanted_names),
    ):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(
                f"initial_weights={folder} {problem} {len(names)} tensors ({shown}); its files "
                "must be those that config.json describes"
            )
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})


def llama_shape(content: dict[str, Any], file: Path) -> dict[str, Any]:
    """The fields of :class:`ModelConfig` that ``file``, a Llama's ``config.json``, fixes."""
    if content.get("model_type") != "llama":
        raise ValueError(f"{file}: model_type={content.get('model_type')} is not supported")
    if missing := [key for key in SHAPE if not content.get(key)]:
        raise DamagedFileError(damaged(file, f"it lacks {', '.join(missing)}", COPY_AGAIN))
    head_dim = content["hidden_size"] // content["num_attention_heads"]
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    unsupported = {
        "rope_scaling": rope.get("rope_type", rope.get("type", "default")) != "default",
        "attention_bias": bool(content.get("attention_bias")),
        "mlp_bias": bool(content.get("mlp_bias")),
        "hidden_act": content.get("hidden_act", "silu") != "silu",
        "head_dim": (content.get("head_dim") or head_dim) != head_dim,
    }
    for key, is_unsupported in unsupported.items():
        if is_unsupported:
            raise ValueError(f"{file}: {key}={content.get(key)} is not supported")
    return {
        "hidden_size": content["hidden_size"],
        "intermediate_size": content["intermediate_size"],
        "num_layers": content["num_hidden_layers"],
        "num_heads": content["num_attention_heads"],
        "num_kv_heads": content.get("num_key_value_heads", content["num_attention_heads"]),
        "vocab_size": content["vocab_size"],
        "rope_theta": content.get("rope_theta", rope.get("rope_theta", 10_000.0)),
        "norm_eps": content["rms_norm_eps"],
    }


def vocabulary(tokenizer: Path) -> dict[str, int]:
    """Number of every token.

    Raises:
        DamagedFileError: it is no tokenizer.
    """
    try:
        ids: dict[str, int] = Tokenizer.from_file(str(tokenizer)).get_vocab()
    except Exception as error:  # the library has no class of its own
        raise DamagedFileError(damaged(tokenizer, str(error), COPY_AGAIN)) from error
    return ids
