"""One student for an ensemble: it learns the mean of its teachers' predictions beside the text.

With the teachers' mean probabilities ``p`` and the student's ``q``, a token with target ``y`` costs

    (1 - s) * (-log q_y) + s * (-sum_j p_j log q_j)

whose second term is Hinton's (1503.02531) at temperature 1. Logits exist for some rows at a time;
the backward pass computes them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trainer.config.schema import DistillationConfig
from trainer.data.batches import NO_TARGET, PackedBatch
from trainer.data.mds import MegadocStream
from trainer.model.llama import SoftTargets
from trainer.parallel.context_parallel import apply_context_parallel
from trainer.parallel.ranks import Ranks
from trainer.run.checkpoint import load_model
from trainer.run.progress import newest_checkpoint, read_progress

CHUNK_ELEMENTS = 1 << 26  # logits held at a time, for the student and for one teacher


def check_teachers(teachers: Sequence[str], stream: MegadocStream) -> None:
    """Look at the teachers without loading them.

    Raises:
        FileNotFoundError: a run has no checkpoint, or has not ended; to learn from one half done,
            name its checkpoint's folder.
        ValueError: a teacher was trained with another tokenizer.
    """
    for run in teachers:
        checkpoint = newest_checkpoint(run)
        if checkpoint != Path(run) and not (Path(run) / "result.json").exists():
            raise FileNotFoundError(
                f"distillation.teachers: {run} is not trained to its end (no result.json); "
                f"wait for it, or name the checkpoint you mean, such as {checkpoint}"
            )
        if read_progress(checkpoint).tokenizer_sha256 != stream.manifest.tokenizer_sha256:
            raise ValueError(
                f"distillation.teachers: {run} was trained with another tokenizer than that of "
                f"{stream.path}; a student needs teachers of its own vocabulary"
            )


class Teachers:
    """Finished runs whose predictions a student learns; see :func:`check_teachers`."""

    def __init__(self, config: DistillationConfig, ranks: Ranks) -> None:
        self.share = config.alpha
        self.models = []
        for run in config.teachers:
            model, _ = load_model(run, ranks.device)
            if ranks.context_group is not None:  # they see a part of the windows, as the student
                apply_context_parallel(model, ranks.context_group)
            self.models.append(model.requires_grad_(False))

    @torch.no_grad()
    def targets(self, batch: PackedBatch) -> SoftTargets:
        """What the teachers make of a batch, as hidden states; their logits come later."""
        inputs = (batch.input_ids, batch.positions, batch.cu_seqlens, batch.max_seqlen)
        hidden = [model.hidden_states(*inputs) for model in self.models]
        heads = [model.lm_head.weight.to(model.compute_dtype) for model in self.models]
        return SoftTargets(self.share, hidden, heads, distillation_loss)


def distillation_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, denominator: Tensor, soft: SoftTargets
) -> Tensor:
    """Summed loss of the rows with a target, divided by ``denominator``.

    Args:
        hidden: ``[T, D]`` of the student.
        weight: ``[V, D]`` of its head, in any precision; its gradient is added up in at least fp32.
        targets: int64 ``[T]``, -100 where there is nothing to predict.
        denominator: scalar.
        soft: the teachers' hidden states and heads.

    Returns:
        Scalar loss in nats, in at least fp32.
    """
    rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
    precision = torch.promote_types(hidden.dtype, torch.float)
    total = torch.zeros((), device=hidden.device, dtype=precision)
    weight = weight.to(precision)  # what the chunks' gradients are added up in
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        total = total + checkpoint(
            chunk_loss,
            hidden[part],
            weight,
            targets[part],
            [state[part] for state in soft.hidden],
            soft.heads,
            soft.share,
            use_reentrant=False,
        )
    return total / denominator


def chunk_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teachers: Sequence[Tensor],
    heads: Sequence[Tensor],
    share: float,
) -> Tensor:
    """The sum over some rows."""
    precision = torch.promote_types(hidden.dtype, torch.float)
    student = (hidden @ weight.to(hidden.dtype).T).to(precision).log_softmax(1)  # [C, V]
    with torch.no_grad():
        mean = torch.zeros_like(student)
        for state, head in zip(teachers, heads, strict=True):
            mean += (state @ head.T).to(precision).softmax(1) / len(teachers)
    chosen = targets.clamp(min=0)[:, None]
    hard = -student.gather(1, chosen)[:, 0]
    soft = -(mean * student).sum(1)
    return torch.where(targets == NO_TARGET, 0.0, (1 - share) * hard + share * soft).sum()
