"""Ensembles: the mean of the members' logits or probabilities, one member in memory at a time.

The hidden states of all held-out tokens are kept for every member (tokens x D numbers), then the
predictions are averaged chunk by chunk; neither K models nor all logits are ever held together.
Every size up to K is scored on the way, because the fit over K needs them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config.evaluate import Mean
from trainer.config.fields import size_in_bytes
from trainer.config.schema import TrainConfig, load_config
from trainer.data.batches import NO_TARGET
from trainer.data.mds import MegadocStream, StreamManifest, read_stream_manifest
from trainer.evaluation.losses import Scores, evaluation_batches
from trainer.parallel.ranks import choose_device
from trainer.run.checkpoint import load_model
from trainer.run.progress import newest_checkpoint, read_progress, trained_now

CHUNK_ELEMENTS = 1 << 24  # logits held at a time


@torch.no_grad()
def evaluate_ensemble(
    runs: Sequence[str | Path], validation: str | None = None, mean: Mean = Mean.logits
) -> list[Scores]:
    """Score the ensembles of the first 1, 2, ..., K runs.

    Args:
        runs: run folders (their newest checkpoints) or checkpoint folders.
        validation: held-out stream by its name or its folder; default the one of the first run.
        mean: what is averaged.

    Raises:
        ValueError: the members differ in data, tokenizer, context or mask, or one is named twice.
    """
    first = check_members(runs, validation)
    device = choose_device("auto")
    stream = MegadocStream(
        held_out_path(first, validation),
        first.data.cache,
        size_in_bytes(first.data.cache_limit, "data.cache_limit"),
    )
    hidden: list[list[Tensor]] = []  # [member][batch] -> [T, D]
    heads: list[Tensor] = []  # [V, D]
    for run in runs:
        model, config = load_model(run, device)
        states = []
        for batch, _ in evaluation_batches(stream, config.readings[0]):
            moved = batch.to(device)
            state = model.hidden_states(
                moved.input_ids, moved.positions, moved.cu_seqlens, moved.max_seqlen
            )
            states.append(state.cpu())
        hidden.append(states)
        heads.append(model.lm_head.weight.to(model.compute_dtype))
    scores = [Scores(stream) for _ in runs]
    losses_of = {Mean.logits: mean_logit_losses, Mean.probabilities: mean_probability_losses}[mean]
    for place, (batch, _) in enumerate(evaluation_batches(stream, first.readings[0])):
        members = [states[place].to(device) for states in hidden]
        for size, losses in zip(
            scores, losses_of(members, heads, batch.targets.to(device)), strict=True
        ):
            size.add(batch, losses)
    return scores


def check_distinct(runs: Sequence[str | Path]) -> None:
    """Raise ValueError where a member stands twice, be it as a copy in another folder."""
    seen: dict[str, str | Path] = {}
    for run in runs:
        for name in filter(None, (str(Path(run).resolve()), trained_now(run))):
            if name in seen:
                raise ValueError(
                    f"runs={[str(one) for one in runs]} names a member twice: {run} holds the "
                    f"weights of {seen[name]}"
                )
            seen[name] = run


def check_members(runs: Sequence[str | Path], validation: str | None) -> TrainConfig:
    """The config of the first member, before any is loaded.

    Raises:
        ValueError: the members do not go together, or not with the held-out stream.
    """
    if not runs:
        raise ValueError("runs=[] names no run to evaluate")
    check_distinct(runs)
    configs = [config_of(run) for run in runs]
    path = held_out_path(configs[0], validation)
    manifest = read_stream_manifest(path)
    for run, config in zip(runs, configs, strict=True):
        check_comparable(runs[0], configs[0], run, config)
        check_tokenizer(run, manifest, path)
    return configs[0]


def config_of(run: str | Path) -> TrainConfig:
    """Of a run, or of the run that a checkpoint is of."""
    return load_config(newest_checkpoint(run).parent.parent / "config.yaml")


def describe_overlap(run: str | Path, config: TrainConfig, validation: str | None) -> str | None:
    """A warning where a run may know the documents it is evaluated on from its training.

    Args:
        run: a member.
        config: of the first one, which says where the held-out stream lies.
        validation: its name or folder; None: the one that was held out.
    """
    name = validation or config.data.validation
    inputs = read_progress(newest_checkpoint(run)).inputs
    now = read_stream_manifest(held_out_path(config, validation)).content_sha256
    recipe = config_of(run).recipe
    for trained in filter(None, (recipe.real_stream, recipe.synthetic)):
        if inputs.get(trained) == now:
            return f"{run} was trained on {name}: its loss there says nothing about other text"
    if name == config.data.validation and inputs.get(name, now) != now:
        return (
            f"{held_out_path(config, validation)} is not what {run} held out ({inputs[name][:12]}, "
            f"now {now[:12]}): it may have been trained on some of these documents"
        )
    return None


def held_out_path(config: TrainConfig, name: str | None = None) -> str:
    """Folder of a stream by its name in the run's corpus, or by its own path; None: held out."""
    name = name or config.data.validation
    return name if "/" in name else f"{config.data.root}/streams/{name}"


def check_tokenizer(run: str | Path, manifest: StreamManifest, path: str) -> None:
    """Raise ValueError where a model was trained with another tokenizer than the stream's."""
    trained = read_progress(newest_checkpoint(run)).tokenizer_sha256
    if trained != manifest.tokenizer_sha256:
        raise ValueError(
            f"{run} was trained with the tokenizer {trained[:12]}, {path} was written with "
            f"{manifest.tokenizer_sha256[:12]}; its losses would mean nothing"
        )


def mean_logit_losses(hidden: list[Tensor], heads: list[Tensor], targets: Tensor) -> Tensor:
    """Cross-entropy of the averaged logits of the first 1, ..., K members.

    Args:
        hidden: one ``[T, D]`` a member.
        heads: one ``[V, D]`` a member.
        targets: int64 ``[T]``, -100 where there is nothing to predict.

    Returns:
        ``[K, T]`` losses in nats, 0 without a target; fp32, or fp64 where the heads are.
    """
    chunks = []
    for part in chunked(targets, heads):
        total: Tensor | float = 0.0  # [C, V]
        sizes = []
        for size, (states, head) in enumerate(zip(hidden, heads, strict=True), 1):
            total = at_least_fp32(states[part] @ head.T) + total
            sizes.append(
                F.cross_entropy(
                    total / size, targets[part], ignore_index=NO_TARGET, reduction="none"
                )
            )
        chunks.append(torch.stack(sizes))
    return torch.cat(chunks, dim=1)


def mean_probability_losses(hidden: list[Tensor], heads: list[Tensor], targets: Tensor) -> Tensor:
    """Cross-entropy of the averaged probabilities; arguments and result as in mean of logits.

    Only the target's probability matters, so ``-log(mean_k p_k)`` is a log-sum-exp over members of
    the losses, which never underflows.
    """
    chunks = []
    for part in chunked(targets, heads):
        losses = torch.stack(
            [
                F.cross_entropy(
                    at_least_fp32(states[part] @ head.T),
                    targets[part],
                    ignore_index=NO_TARGET,
                    reduction="none",
                )
                for states, head in zip(hidden, heads, strict=True)
            ]
        )  # [K, C]
        counts = torch.arange(1, len(heads) + 1, device=losses.device, dtype=losses.dtype)
        chunks.append(counts.log()[:, None] - torch.logcumsumexp(-losses, dim=0))
    # A place without a target has the loss 0 in every member, hence 0 here as well.
    return torch.cat(chunks, dim=1)


def chunked(targets: Tensor, heads: list[Tensor]) -> Iterator[slice]:
    """Parts of the tokens whose logits fit in memory together."""
    rows = max(1, CHUNK_ELEMENTS // heads[0].shape[0])
    for start in range(0, len(targets), rows):
        yield slice(start, start + rows)


def at_least_fp32(logits: Tensor) -> Tensor:
    return logits if logits.dtype is torch.float64 else logits.float()


def check_comparable(
    first_run: str | Path, first: TrainConfig, run: str | Path, config: TrainConfig
) -> None:
    """Raise ValueError where two members do not predict the same tokens from the same context."""
    ours, theirs = (
        read_progress(newest_checkpoint(one)).inputs.get(settings.data.validation, "unknown")
        for one, settings in ((first_run, first), (run, config))
    )
    if ours != theirs:
        raise ValueError(
            f"{run} was evaluated on other held-out documents ({theirs[:12]}) than {first_run} "
            f"({ours[:12]}): one may have been trained on the other's; members of an ensemble must "
            "read the same corpus"
        )
    for name in ("context_length", "mask"):
        ours, theirs = getattr(first.readings[0], name), getattr(config.readings[0], name)
        if ours != theirs:
            raise ValueError(
                f"{run} was read with data.{name}={theirs}, {first_run} with {ours} (or evaluation."
                f"{name}s): members of an ensemble must read the same held-out data in the same way"
            )
    if first.model.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"{run} has a vocabulary of {config.model.vocab_size}, {first_run} one of "
            f"{first.model.vocab_size}: their logits cannot be averaged"
        )
