"""One training step of this trainer against plain PyTorch and Hugging Face.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --models 300m --contexts 32768 --documents 1200

A step is forward, backward, clipping and AdamW on one micro-batch. Ours: this project's model with
the kernels that the self-check takes, blocks compiled. ``plain``: the same model with dense SDPA
per window (or, with several documents a window, FlexAttention) and an unfused loss, compiled
likewise. ``hf``: Hugging Face's Llama with variable-length FlashAttention (the flash-attn package's
where installed, else PyTorch's) and, where installed, Liger's kernels. All are timed in turn in one
process, on the same weights and optimiser states. MFU counts causal FLOPs inside documents and the
head, without recomputation, over the GPU's dense bf16 peak.
"""

from __future__ import annotations

import importlib.util
import operator
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from benchmarks import timing
from kernels import varlen_attention
from kernels.attention.flex import document_block_mask
from trainer.config.schema import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RecipeConfig,
    TrainConfig,
)
from trainer.data.batches import PackedBatch
from trainer.data.random_stream import random_windows
from trainer.loop import accumulate_gradients
from trainer.model.flops import attention_pairs, peak_flops, training_flops
from trainer.model.llama import Attention, KernelBackends, Llama
from trainer.optim.optimizer import build_optimizers
from trainer.parallel.ranks import Ranks
from trainer.run.kernel_choice import checked_kernels
from trainer.setup import prepare_blocks

MODELS = Path(__file__).parents[1] / "conf" / "train" / "model"
VOCABULARY = 128_256
DEFAULT = KernelBackends()
GPU = {"models": ["300m", "1_5b"], "contexts": [4096, 32_768, 131_072], "documents": [0, 1200]}
CPU = {"models": ["tiny"], "contexts": [256], "documents": [0, 60]}


def model_config(name: str, vocabulary: int) -> ModelConfig:
    """A size of ``conf/train/model``."""
    config = OmegaConf.merge(ModelConfig, OmegaConf.load(MODELS / f"{name}.yaml"))
    built = OmegaConf.to_object(config)
    assert isinstance(built, ModelConfig)
    built.vocab_size = vocabulary
    return built


def micro_batch_tokens(name: str, device: torch.device) -> int:
    """Tokens of a micro-batch of a model, few enough for the peers' logits and activations."""
    if device.type == "cpu":
        return 4096
    return {"600m": 32_768, "1_5b": 16_384}.get(name, 65_536)


def random_batch(tokens: int, context: int, document: int, vocabulary: int) -> PackedBatch:
    """Full windows of random tokens as the trainer packs them: one document each, or documents of
    about ``document`` tokens."""
    generator = np.random.default_rng(0)
    windows: list[list[int]] = [[] for _ in range(tokens // context)]
    for lengths in windows:
        while (room := context - sum(lengths)) > 0:
            length = int(document * generator.uniform(0.5, 1.5)) if document else context
            lengths.append(min(max(1, length), room))
    return random_windows(windows, context, vocabulary)


class Setting:
    """What all ways of taking the step share: config, batch, weights and optimiser states.

    One set of states leaves room for the activations of the largest model, and gives every way the
    peak it would have alone.
    """

    def __init__(self, config: TrainConfig, batch: PackedBatch, ranks: Ranks) -> None:
        self.config = config
        self.batch = batch.to(ranks.device)
        self.ranks = ranks
        self.dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
        with ranks.device:  # where random numbers take no time
            self.weights = Llama(config.model)
        [self.optimizer] = build_optimizers(self.weights, config.optimizer, config.recipe)

    def model(self, kernels: KernelBackends = DEFAULT) -> Llama:
        """A model on the shared weights."""
        with self.ranks.device:
            model = Llama(self.config.model, 0, self.dtype, kernels)
        self.share_weights(model)
        return model

    def share_weights(self, model: nn.Module) -> None:
        """Replace the weights of ``model`` by the shared ones."""
        model.load_state_dict(self.weights.state_dict(keep_vars=True), assign=True)

    def step(self, gradients: Callable[[], object]) -> timing.Candidate:
        """The whole step of a way that computes its gradients by ``gradients``."""

        def step() -> None:
            self.optimizer.zero_grad(set_to_none=True)  # of a way that ran out of memory
            gradients()
            clip_grad_norm_(self.weights.parameters(), self.config.optimizer.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        return step

    def peak_bytes(self, step: timing.Candidate) -> int | None:
        """Bytes held at the peak of a step, the fp32 weights and their two moments included."""
        above = timing.peak_bytes(step)
        return None if above is None else above + 12 * self.config.model.parameter_count()


def ours(
    setting: Setting, kernels: KernelBackends = DEFAULT, compiled: bool | None = None
) -> timing.Candidate:
    """The trainer's own step; blocks are compiled as it does by itself, or as asked for."""
    config = setting.config
    config = replace(config, runtime=replace(config.runtime, compile=compiled))
    model = setting.model(kernels)
    prepare_blocks(model, config, setting.ranks)
    return setting.step(lambda: accumulate_gradients(model, [setting.batch], setting.ranks))


def plain(setting: Setting) -> timing.Candidate:
    """The same model in plain PyTorch: library attention, logits in memory."""
    batch, model = setting.batch, setting.model()
    attend = library_attention(batch, setting.config.data.context_length)
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attend
    for layer in model.model.layers:
        layer.compile()

    @torch.compile
    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.to(hidden.dtype).T
        return F.cross_entropy(logits.float(), batch.targets)

    def gradients() -> None:
        hidden = model.hidden_states(
            batch.input_ids, batch.positions, batch.cu_seqlens, batch.max_seqlen
        )
        loss_of(hidden, model.lm_head.weight).backward()

    return setting.step(gradients)


def library_attention(batch: PackedBatch, context: int) -> Any:
    """Causal SDPA of whole windows, or a document mask where windows hold several."""
    device = batch.input_ids.device
    windows = len(batch.input_ids) // context
    lengths = batch.cu_seqlens.diff()
    document = torch.arange(len(lengths), device=device).repeat_interleave(lengths)  # [T]
    single = int((lengths > 0).sum()) == windows

    def dense(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, tiles: Any
    ) -> Tensor:
        q, k, v = (x.unflatten(0, (windows, context)).transpose(1, 2) for x in (q, k, v))
        mask = None
        if not single:
            own = document.view(windows, 1, context)
            same = own.transpose(1, 2) == own  # [windows, context, context]
            mask = (same & torch.ones_like(same).tril())[:, None]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(0, 1)

    if single or device.type != "cuda":
        return dense
    from torch.nn.attention.flex_attention import flex_attention

    blocks = document_block_mask(batch.cu_seqlens, len(batch.input_ids))

    def flex(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, tiles: Any
    ) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = flex_attention(q, k, v, block_mask=blocks, enable_gqa=True)
        assert isinstance(out, Tensor)
        return out[0].transpose(0, 1)

    return flex


def hugging_face(setting: Setting) -> timing.Candidate:
    """Hugging Face's Llama on the packed axis, with Liger's kernels where they are installed."""
    import transformers

    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    attention = "flash_attention_2"
    if not importlib.util.find_spec("flash_attn"):
        attention = "varlen"
        transformers.AttentionInterface.register(attention, packed_attention)
    size, batch, device = setting.config.model, setting.batch, setting.ranks.device
    shape = transformers.LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        max_position_embeddings=setting.config.data.context_length,
        rms_norm_eps=size.norm_eps,
        rope_theta=size.rope_theta,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation=attention,
    )
    with device:
        model: nn.Module = transformers.LlamaForCausalLM(shape)
    setting.share_weights(model)
    packed = {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.positions[None],
        "labels": batch.input_ids[None].masked_fill(batch.positions[None] == 0, -100),
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": batch.max_seqlen,
        "max_length_k": batch.max_seqlen,
    }

    def gradients() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**packed).loss
        loss.backward()

    return setting.step(gradients)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: object,
) -> tuple[Tensor, None]:
    """PyTorch's variable-length attention as Hugging Face calls it: ``[1, H, T, Dh]`` each."""
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))  # [T, H, Dh]
    return varlen_attention(q, k, v, cu_seq_lens_q, max_length_q, scale=scaling)[None], None


def measure(
    name: str,
    context: int,
    document: int,
    tokens: int | None,
    names: list[str],
    rounds: int,
    ranks: Ranks,
) -> list[dict[str, Any]]:
    """One row for every way to take the step."""
    size = model_config(name, VOCABULARY if ranks.device.type == "cuda" else 4096)
    tokens = max((tokens or micro_batch_tokens(name, ranks.device)) // context, 1) * context
    config = TrainConfig(
        data=DataConfig(context_length=context, batch_size=tokens // context),
        recipe=RecipeConfig(),
        model=size,
        optimizer=OptimizerConfig(),
    )
    batch = random_batch(tokens, context, document, size.vocab_size)
    setting = Setting(config, batch, ranks)
    chosen = KernelBackends(*checked_kernels(config, lambda: batch, ranks))
    builders: dict[str, Callable[[Setting], timing.Candidate]] = {
        "ours": partial(ours, kernels=chosen),
        "plain": plain,
        "hf": hugging_face,
    }
    if ranks.device.type == "cuda":
        for loss in ("torch", "triton"):
            builders[f"{loss} loss"] = partial(ours, kernels=replace(chosen, loss=loss))
        builders["lean loss"] = partial(ours, kernels=replace(chosen, loss_memory="lean"))
        builders["flash"] = partial(ours, kernels=replace(chosen, attention="flash"))
        builders["triton"] = partial(ours, kernels=replace(chosen, attention="triton"))
    else:
        builders["ours compiled"] = partial(ours, compiled=True)
    rows: list[dict[str, Any]] = []
    shape = {"model": name, "context": context, "document": document or context, "tokens": tokens}
    candidates: dict[str, timing.Candidate] = {}
    for way, build in builders.items():
        if names and way not in names:
            continue
        try:
            candidates[way] = build(setting)
        except Exception as error:  # a peer that is not installed whole must not end the others
            rows.append({**shape, "way": way, "failed": f"{type(error).__name__}: {error}"[:200]})
    times, failed = timing.interleaved(candidates, rounds, flush=False)
    rows += [{**shape, "way": way, "failed": why} for way, why in failed.items()]
    flops = training_flops(size, tokens, attention_pairs(batch.cu_seqlens))
    peak = peak_flops(ranks.device)
    for way, seconds in times.items():
        rows.append(
            {
                **shape,
                "way": way,
                "seconds": seconds,
                "tokens_per_second": tokens / seconds["median"],
                "mfu": flops / seconds["median"] / peak if peak else None,
                "peak_bytes": setting.peak_bytes(candidates[way]),
            }
        )
    return rows


def show(rows: list[timing.Row]) -> None:
    """One line a way."""
    first = rows[0]
    timing.print_table(
        f"{first['model']}, context {first['context']:,}, documents of {first['document']:,}",
        rows,
        ("way",),
        lambda row: {
            "ms": row["seconds"]["median"] * 1e3,
            "tokens/s": row["tokens_per_second"],
            "MFU %": None if row["mfu"] is None else 100 * row["mfu"],
            "peak GiB": None if row["peak_bytes"] is None else row["peak_bytes"] / 2**30,
        },
        ",.1f",
    )


def group_label(row: dict[str, Any]) -> str:
    return f"{row['model']}\n{row['context']:,}\n{row['document']:,}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens per second, a group of bars for each setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(10, 4))
    speed = operator.itemgetter("tokens_per_second")
    timing.grouped_bars(axis, timing.bars_of(rows, "way", group_label, speed))
    axis.set_xlabel("model, context, tokens a document")
    axis.set_ylabel("tokens/s")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    assert __doc__ is not None
    parser = timing.arguments(__doc__.partition("\n")[0], "train-step")
    place = timing.device()
    defaults = GPU if place.type == "cuda" else CPU
    parser.add_argument("--models", nargs="*", default=defaults["models"])
    parser.add_argument("--contexts", nargs="*", type=int, default=defaults["contexts"])
    parser.add_argument("--documents", nargs="*", type=int, default=defaults["documents"],
                        help="tokens a document; 0: as long as the window")  # fmt: skip
    parser.add_argument("--tokens", type=int, help="of a micro-batch; default: by model")
    parser.add_argument(
        "--ways", nargs="*", default=[], help="ours, torch loss, triton loss, flash, plain, hf, ..."
    )
    options = parser.parse_args(arguments)
    ranks = Ranks(0, 1, place)
    rows = []
    for model in options.models:
        for context in options.contexts:
            for document in options.documents:
                found = measure(
                    model, context, document, options.tokens, options.ways, options.rounds, ranks
                )
                show(found)
                rows += found
                if place.type == "cuda":
                    torch.cuda.empty_cache()
                    torch._dynamo.reset()
    timing.write_results(options.output, "python -m benchmarks.train_step", rows)
    plot(rows, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
