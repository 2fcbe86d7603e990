"""Losses on held-out documents: all, short, long, and by position in the document.

Every token of the stream is scored once. Context and mask are the training's, as in the paper, or
those of ``evaluation``: with the mask ``none`` documents share windows, otherwise each is read
alone (cut only where it is longer than the context).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config.schema import DataConfig, Mask, Reading
from trainer.data.batches import NO_TARGET, PackedBatch, collate
from trainer.data.format import MEMBER_KINDS
from trainer.data.mds import MegadocStream
from trainer.data.packing import concatenate_and_cut, pack_whole
from trainer.model.llama import Llama
from trainer.parallel.context_parallel import split_batch
from trainer.parallel.ranks import Ranks

BATCH_TOKENS = 16_384  # tokens in one forward pass
BUCKETS = 24  # positions up to 2 ** 23


@dataclass
class Scores:
    """Summed losses of a stream; ``add`` batches, then read the means."""

    stream: MegadocStream
    document_loss: NDArray[np.float64] = field(init=False)  # float64 [N], nats
    document_tokens: NDArray[np.float64] = field(init=False)  # float64 [N]
    bucket_loss: NDArray[np.float64] = field(init=False)  # float64 [BUCKETS], nats
    bucket_tokens: NDArray[np.float64] = field(init=False)  # float64 [BUCKETS]
    kind_loss: NDArray[np.float64] = field(init=False)  # float64 [MEMBER_KINDS], nats
    kind_tokens: NDArray[np.float64] = field(init=False)  # float64 [MEMBER_KINDS]
    style_loss: NDArray[np.float64] = field(
        init=False
    )  # float64 [1 + styles], nats; the first: of no style
    style_tokens: NDArray[np.float64] = field(init=False)  # float64 [1 + styles]

    def __post_init__(self) -> None:
        self.kind_loss, self.kind_tokens = np.zeros((2, len(MEMBER_KINDS)))
        self.style_loss, self.style_tokens = np.zeros((2, 1 + len(self.stream.manifest.styles)))
        self.document_loss, self.document_tokens = np.zeros((2, len(self.stream)))
        self.bucket_loss, self.bucket_tokens = np.zeros((2, BUCKETS))

    def add(self, batch: PackedBatch, losses: Tensor) -> None:
        """Add the losses ``[T]`` of a batch on the host; places without a target count nothing."""
        valid = (batch.targets != NO_TARGET).numpy()
        loss = losses.double().cpu().numpy()[valid]
        documents = batch.target_documents.numpy()[valid]
        positions = batch.target_positions.numpy()[valid]
        buckets = position_bucket(positions)
        if self.has_members or self.stream.manifest.styles:
            kinds, styles = self.member_kinds_and_styles(documents, positions)
            self.kind_loss += np.bincount(kinds, loss, len(MEMBER_KINDS))
            self.kind_tokens += np.bincount(kinds, minlength=len(MEMBER_KINDS))
            self.style_loss += np.bincount(styles, loss, len(self.style_loss))
            self.style_tokens += np.bincount(styles, minlength=len(self.style_loss))
        size = len(self.stream)
        self.document_loss += np.bincount(documents, loss, size)
        self.document_tokens += np.bincount(documents, minlength=size)
        self.bucket_loss += np.bincount(buckets, loss, BUCKETS)
        self.bucket_tokens += np.bincount(buckets, minlength=BUCKETS)

    @property
    def has_members(self) -> bool:
        """Whether the documents are megadocs of several members."""
        return self.stream.has_members

    def member_kinds_and_styles(
        self, documents: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Kind and style of the member that each position ``[T]`` of its document ``[T]`` is in."""
        kinds, styles = np.zeros((2, len(documents)), dtype=np.int64)
        for document in np.unique(documents):
            sample = self.stream[int(document)]
            mine = documents == document
            member = np.searchsorted(sample.member_ends, positions[mine], side="right")
            kinds[mine] = sample.member_kinds[member]
            if sample.member_styles is not None:
                styles[mine] = sample.member_styles[member]
        return kinds, styles

    def sum_over(self, ranks: Ranks) -> None:
        """Add the other ranks' parts."""
        for name in (
            *("document_loss", "document_tokens", "bucket_loss", "bucket_tokens"),
            *("kind_loss", "kind_tokens", "style_loss", "style_tokens"),
        ):
            total = torch.from_numpy(getattr(self, name)).to(ranks.device)
            setattr(self, name, ranks.all_reduce(total).cpu().numpy())

    @property
    def cut_off(self) -> int:
        """Length in tokens up to which a document counts as short: the median."""
        return int(np.median(self.stream.lengths))

    @property
    def loss(self) -> dict[str, float]:
        """Nats per token over all (``iid``), ``short`` and ``long`` documents."""
        short = self.stream.lengths <= self.cut_off
        sets = {"iid": np.ones_like(short), "short": short, "long": ~short}
        return {
            name: float(self.document_loss[chosen].sum() / self.document_tokens[chosen].sum())
            for name, chosen in sets.items()
            if self.document_tokens[chosen].any()
        }

    @property
    def bits_per_byte(self) -> float:
        """Bits for every UTF-8 byte of the held-out text.

        Without ``mask=none`` a document's first token is given, not predicted: it costs nothing.
        """
        return float(self.document_loss.sum() / math.log(2) / self.stream.manifest.bytes)

    @property
    def loss_by_position(self) -> dict[str, float]:
        """Nats per token by the first position of each bucket: 0, 1, 2, 4, 8, ..."""
        return {
            str(0 if bucket == 0 else 1 << (bucket - 1)): float(loss / tokens)
            for bucket, (loss, tokens) in enumerate(
                zip(self.bucket_loss, self.bucket_tokens, strict=True)
            )
            if tokens
        }

    @property
    def loss_by_kind(self) -> dict[str, float]:
        """Nats per token of the real, rephrased and thought members, given what precedes them."""
        return {
            name: float(loss / tokens)
            for name, loss, tokens in zip(
                MEMBER_KINDS, self.kind_loss, self.kind_tokens, strict=True
            )
            if tokens
        }

    @property
    def loss_by_style(self) -> dict[str, float]:
        """Nats per token of the rephrases of each method, where the stream has several."""
        return {
            name: float(loss / tokens)
            for name, loss, tokens in zip(
                self.stream.manifest.styles,
                self.style_loss[1:],
                self.style_tokens[1:],
                strict=True,
            )
            if tokens
        }

    def metrics(self) -> dict[str, float]:
        """For the log."""
        named = {f"eval/{name}": value for name, value in self.loss.items()}
        return named | {"eval/bits_per_byte": self.bits_per_byte}

    def to_dict(self) -> dict[str, Any]:
        """For ``result.json``."""
        manifest = self.stream.manifest
        return {
            "loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "loss_by_position": self.loss_by_position,
            **({"loss_by_kind": self.loss_by_kind} if self.has_members else {}),
            **({"loss_by_style": self.loss_by_style} if self.loss_by_style else {}),
            "evaluation": {
                "stream": manifest.name,
                "documents": len(self.stream),
                "tokens": int(self.document_tokens.sum()),
                "short_up_to": self.cut_off,
                "tokenizer_sha256": manifest.tokenizer_sha256,
                "content_sha256": manifest.content_sha256,
                "near_duplicates": manifest.near_duplicates,
            },
        }


def position_bucket(positions: NDArray[np.int64]) -> NDArray[np.int32]:
    """Bucket of each position: 0 for 0, then powers of two (1, 2-3, 4-7, ...)."""
    return np.frexp(positions.astype(np.float64))[1].clip(0, BUCKETS - 1)


def evaluation_batches(
    stream: MegadocStream, reading: Reading | DataConfig, ranks: Ranks | None = None
) -> Iterator[tuple[PackedBatch, bool]]:
    """This rank's batches of the whole stream, and whether each counts.

    All ranks yield the same number of batches (sharded models run forward together); a rank that
    has fewer repeats one that does not count.
    """
    rank, world_size = (ranks.data_rank, ranks.data_size) if ranks else (0, 1)
    if reading.mask is Mask.none:
        order = np.arange(len(stream))
        packed = concatenate_and_cut(stream.lengths, order, reading.context_length)
    else:
        packed = pack_whole(stream.lengths, reading.context_length, np.random.default_rng(0))
    count = len(packed.offsets) - 1
    size = max(1, BATCH_TOKENS // reading.context_length)
    for start in range(0, -(-count // size), world_size):
        first = (start + rank) * size
        counts = first < count
        windows = [
            packed.window(0, index)
            for index in range(first if counts else 0, min(count, (first if counts else 0) + size))
        ]
        yield collate(windows, [stream], reading.mask, reading.context_length), counts


@torch.no_grad()
def evaluate_model(
    model: Llama, stream: MegadocStream, reading: Reading | DataConfig, ranks: Ranks
) -> Scores:
    """Score every token of ``stream`` with one model, shared among the ranks."""
    was_training = model.training
    model.eval()
    scores = Scores(stream)
    for batch, counts in evaluation_batches(stream, reading, ranks):
        own = split_batch(batch, ranks.context_rank, ranks.context_parallel)
        batch = own.to(ranks.device)
        losses = model.token_losses(
            batch.input_ids, batch.positions, batch.cu_seqlens, batch.max_seqlen, batch.targets
        )
        if counts:
            scores.add(own, losses)
    scores.sum_over(ranks)
    model.train(was_training)
    return scores
