"""Ensembles: the mean of the members' logits, one member in memory at a time.

The hidden states of all held-out tokens are kept for every member (tokens x D numbers), then the
logits are averaged chunk by chunk; neither K models nor all logits are ever held together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpoint import load_model, newest_checkpoint, read_progress
from trainer.config import TrainConfig
from trainer.data import NO_TARGET
from trainer.distributed import choose_device
from trainer.evaluation import Scores, evaluation_batches
from trainer.mds import MegadocStream

CHUNK_ELEMENTS = 1 << 24  # logits held at a time


@torch.no_grad()
def evaluate_runs(runs: Sequence[str | Path], validation: str | None = None) -> Scores:
    """Score one run, or the mean of logits of several.

    Args:
        runs: run folders (their newest checkpoints) or checkpoint folders.
        validation: name of the held-out stream; default the one of the first run.

    Raises:
        ValueError: the members differ in data, tokenizer, context or mask.
    """
    device = choose_device("auto")
    first: TrainConfig | None = None
    hidden: list[list[Tensor]] = []  # [member][batch] -> [T, D]
    heads: list[Tensor] = []  # [V, D]
    stream = None
    for run in runs:
        model, config = load_model(run, device)
        if first is None:
            first = config
            name = validation or config.data.validation
            stream = MegadocStream(f"{config.data.root}/streams/{name}", config.data.cache)
        assert stream is not None
        check_comparable(runs[0], first, run, config)
        check_tokenizer(run, stream)
        states = []
        for batch, _ in evaluation_batches(stream, config.data):
            moved = batch.to(device)
            state = model(moved.input_ids, moved.positions, moved.cu_seqlens, moved.max_seqlen)
            states.append(state.cpu())
        hidden.append(states)
        heads.append(model.lm_head.weight.to(model.compute_dtype))
    if first is None or stream is None:
        raise ValueError("runs=[] names no run to evaluate")
    scores = Scores(stream)
    for place, (batch, _) in enumerate(evaluation_batches(stream, first.data)):
        members = [states[place].to(device) for states in hidden]
        scores.add(batch, mean_logit_losses(members, heads, batch.targets.to(device)))
    return scores


def check_tokenizer(run: str | Path, stream: MegadocStream) -> None:
    """Raise ValueError where a model was trained with another tokenizer than the stream's."""
    trained = read_progress(newest_checkpoint(run)).tokenizer_sha256
    if trained != stream.manifest.tokenizer_sha256:
        raise ValueError(
            f"{run} was trained with the tokenizer {trained[:12]}, {stream.path} was written with "
            f"{stream.manifest.tokenizer_sha256[:12]}; its losses would mean nothing"
        )


def mean_logit_losses(hidden: list[Tensor], heads: list[Tensor], targets: Tensor) -> Tensor:
    """Cross-entropy of the averaged logits.

    Args:
        hidden: one ``[T, D]`` a member.
        heads: one ``[V, D]`` a member.
        targets: int64 ``[T]``, -100 where there is nothing to predict.

    Returns:
        fp32 ``[T]`` losses in nats, 0 without a target.
    """
    losses = []
    rows = max(1, CHUNK_ELEMENTS // heads[0].shape[0])
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        logits = sum(
            (states[part] @ head.T).float() for states, head in zip(hidden, heads, strict=True)
        ) / len(hidden)  # [C, V]
        assert isinstance(logits, Tensor)
        losses.append(
            torch.nn.functional.cross_entropy(
                logits, targets[part], ignore_index=NO_TARGET, reduction="none"
            )
        )
    return torch.cat(losses)


def check_comparable(
    first_run: str | Path, first: TrainConfig, run: str | Path, config: TrainConfig
) -> None:
    """Raise ValueError where two members do not predict the same tokens from the same context."""
    for name in ("root", "context_length", "mask"):
        ours, theirs = getattr(first.data, name), getattr(config.data, name)
        if ours != theirs:
            raise ValueError(
                f"{run} has data.{name}={theirs}, {first_run} has {ours}: members of an ensemble "
                "must read the same held-out data in the same way"
            )
    if first.model.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"{run} has a vocabulary of {config.model.vocab_size}, {first_run} one of "
            f"{first.model.vocab_size}: their logits cannot be averaged"
        )
