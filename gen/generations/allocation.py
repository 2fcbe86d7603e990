"""How many generations each document gets: all the same, or more where a model's loss is high."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gen.corpus.documents import Document
from gen.prompts import MethodConfig
from trainer.data.format import LOSS_COLUMNS


def allotment(method: MethodConfig, documents: Sequence[Document]) -> NDArray[np.int64]:
    """Generations of each document: int64 ``[documents]``; their mean is ``method.generations``.

    Raises:
        FileNotFoundError, ValueError: ``method.losses`` is not there, no such file, or lacks
            documents.
    """
    if not method.by_loss:
        return np.full(len(documents), method.generations)
    assert method.losses is not None  # MethodConfig.check
    return by_rank(read_losses(Path(method.losses), documents), method.generations)


def by_rank(losses: NDArray[np.float64], generations: int) -> NDArray[np.int64]:
    """One generation for each document; the rest grows with the rank of its loss.

    Of the G - 1 more on the mean, the document of the lowest loss gets none and that of the highest
    twice as many, linearly in the rank between: neither the unit nor the spread of the losses
    matters, and a document with a loss out of all proportion gets no more than 2 G - 1.

    Args:
        losses: of the documents, nats per token: float64 ``[D]``; equal ones rank as they stand.
        generations: G, their mean.

    Returns:
        int64 ``[D]``, D x G in all.
    """
    size = len(losses)
    ranks = np.arange(size + 1, dtype=np.float64)
    ends = np.rint((generations - 1) * ranks * ranks / max(1, size)).astype(np.int64)
    counts = np.empty(size, dtype=np.int64)
    counts[np.argsort(losses, kind="stable")] = 1 + np.diff(ends)
    return counts


def read_losses(path: Path, documents: Sequence[Document]) -> NDArray[np.float64]:
    """Loss of each document, nats per token: float64 ``[documents]``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another file, or documents have no loss in it.
    """
    made = "python evaluate.py runs=[RUN] validation=real document_losses=FILE writes one"
    if not path.exists():
        raise FileNotFoundError(f"method.losses={path} is not there; {made}")
    try:
        table = pq.read_table(path, columns=list(LOSS_COLUMNS), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"method.losses={path} is no table of losses ({str(error).splitlines()[0]}); {made}"
        ) from error
    ids, losses = (table[name].to_pylist() for name in LOSS_COLUMNS)
    known = dict(zip(ids, losses, strict=True))
    lacking = [document.id for document in documents if known.get(document.id) is None]
    if lacking:
        raise ValueError(
            f"method.losses={path} has no loss of {len(lacking):,} of {len(documents):,} training "
            f"documents, the first {lacking[0]!r}: score all of them, {made}"
        )
    return np.array([known[document.id] for document in documents], dtype=np.float64)
