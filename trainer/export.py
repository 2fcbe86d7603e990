"""Hugging Face Llama folders: export of a trained run, import of the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from trainer.checkpoint import load_model, newest_checkpoint, read_progress
from trainer.config import TrainConfig
from trainer.model import Llama, ModelConfig

SHARD_BYTES = 4 << 30


def export_run(run: str | Path, folder: Path) -> None:
    """Write a run as ``LlamaForCausalLM`` with sharded safetensors and its tokenizer.

    Raises:
        ValueError: ``folder`` exists and is not empty, or the corpus folder has got another
            tokenizer since.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"export={folder} is not empty; choose a new folder")
    model, config = load_model(run)
    tokenizer = Path(config.data.root) / "tokenizer"
    manifest = json.loads((tokenizer / "manifest.json").read_text())
    trained = read_progress(newest_checkpoint(run)).tokenizer_sha256
    if trained != manifest["sha256"]:
        raise ValueError(
            f"{run} was trained with the tokenizer {trained[:12]}, {tokenizer} now holds "
            f"{manifest['sha256'][:12]}; put the old one back to export them together"
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_shards(model.state_dict(), folder)
    (folder / "config.json").write_text(
        json.dumps(hugging_face_config(config, manifest["eos_id"]), indent=1)
    )
    shutil.copy(tokenizer / "tokenizer.json", folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": manifest["eos_token"],
                "model_max_length": config.data.context_length,
            },
            indent=1,
        )
    )


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
        "rope_theta": model.rope_theta,
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


def import_model(folder: Path) -> Llama:
    """Read a Llama folder, exported here or elsewhere, for continued pre-training.

    Raises:
        FileNotFoundError: the folder holds no safetensors.
        ValueError: the model is not a plain Llama.
    """
    content = json.loads((folder / "config.json").read_text())
    unsupported = {
        "model_type": content.get("model_type") != "llama",
        "rope_scaling": content.get("rope_scaling") is not None,
        "attention_bias": bool(content.get("attention_bias")),
    }
    for key, is_unsupported in unsupported.items():
        if is_unsupported:
            raise ValueError(f"{folder}/config.json: {key}={content.get(key)} is not supported")
    config = ModelConfig(
        hidden_size=content["hidden_size"],
        intermediate_size=content["intermediate_size"],
        num_layers=content["num_hidden_layers"],
        num_heads=content["num_attention_heads"],
        num_kv_heads=content.get("num_key_value_heads", content["num_attention_heads"]),
        vocab_size=content["vocab_size"],
        rope_theta=content.get("rope_theta", 10_000.0),
        norm_eps=content["rms_norm_eps"],
    )
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    if not state:
        raise FileNotFoundError(f"{folder} holds no *.safetensors files")
    if content.get("tie_word_embeddings"):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    model = Llama(config)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model
