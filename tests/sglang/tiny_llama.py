"""A Llama of random weights with a byte-level tokenizer and a chat template, in SGLang's form."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

LAYERS, WIDTH, HEADS, KV_HEADS, HIDDEN = 2, 64, 4, 2, 128
HEAD = WIDTH // HEADS
CONTEXT = 8192  # tokens
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_llama(folder: Path) -> None:
    """Fill ``folder`` with config, tokenizer and weights; the same ones each time."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(vocabulary), folder / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(folder: Path) -> int:
    """Every byte is a token, and so are the words the tests use; returns the vocabulary's size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = "the harbour lies below old town and its lights are seen from far out at sea one"
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([words] * 50, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "chat_template": TEMPLATE,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    size: int = tokenizer.get_vocab_size()
    return size


def weights(vocabulary: int) -> dict[str, torch.Tensor]:
    """Random matrices by the names of a Hugging Face checkpoint."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int, scale: float | None = None) -> torch.Tensor:
        drawn = torch.randn(rows, columns, generator=generator)
        return drawn * (columns**-0.5 if scale is None else scale)

    made = {"model.embed_tokens.weight": matrix(vocabulary, WIDTH, 0.05)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        made |= {
            prefix + "self_attn.q_proj.weight": matrix(HEADS * HEAD, WIDTH),
            prefix + "self_attn.k_proj.weight": matrix(KV_HEADS * HEAD, WIDTH),
            prefix + "self_attn.v_proj.weight": matrix(KV_HEADS * HEAD, WIDTH),
            prefix + "self_attn.o_proj.weight": matrix(WIDTH, HEADS * HEAD),
            prefix + "mlp.gate_proj.weight": matrix(HIDDEN, WIDTH),
            prefix + "mlp.up_proj.weight": matrix(HIDDEN, WIDTH),
            prefix + "mlp.down_proj.weight": matrix(WIDTH, HIDDEN),
            prefix + "input_layernorm.weight": torch.ones(WIDTH),
            prefix + "post_attention_layernorm.weight": torch.ones(WIDTH),
        }
    return made | {"model.norm.weight": torch.ones(WIDTH)}
