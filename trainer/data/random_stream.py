"""Random tokens that are read like a stream: what checks and benchmarks hand to ``collate``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.config.schema import Mask
from trainer.data.batches import PackedBatch, collate
from trainer.data.mds import Sample, StreamManifest
from trainer.data.packing import Window


class RandomStream:
    """Documents of given lengths in memory; the tokens of one are the same in every read."""

    def __init__(self, lengths: Sequence[int] | NDArray[np.int64], vocab_size: int) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        tokens = int(self.lengths.sum())
        self.manifest = StreamManifest(
            "random", "random", 0, len(self.lengths), tokens, tokens, vocab_size, 0, "", False, ""
        )

    @property
    def has_members(self) -> bool:
        return False

    def member_ends(self, document: int) -> NDArray[np.int64]:
        return self.lengths[document : document + 1]

    def read_tokens(
        self,
        out: NDArray[np.uint32],
        places: NDArray[np.int64],
        documents: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
    ) -> None:
        """As :meth:`MegadocStream.read_tokens`."""
        for place, document, start, count in zip(
            places.tolist(), documents.tolist(), starts.tolist(), counts.tolist(), strict=True
        ):
            out[place : place + count] = self[document].tokens[start : start + count]

    def __getitem__(self, index: int) -> Sample:
        length = int(self.lengths[index])
        tokens = np.random.default_rng(index).integers(self.manifest.vocab_size, size=length)
        kinds = np.zeros(1, dtype=np.uint8)
        return Sample(f"random-{index}", tokens, np.array([length]), kinds)


def random_windows(
    lengths: Sequence[Sequence[int]],
    context_length: int,
    vocab_size: int = 2,
    mask: Mask = Mask.megadoc,
) -> PackedBatch:
    """Windows that hold whole documents of these lengths, as the trainer packs them."""
    windows, documents = [], 0
    for own in lengths:
        places = np.arange(documents, documents + len(own))
        sizes = np.asarray(own, dtype=np.int64)
        windows.append(Window(0, places, np.zeros_like(sizes), sizes))
        documents += len(own)
    stream = RandomStream([length for own in lengths for length in own], vocab_size)
    return collate(windows, [stream], mask, context_length)
