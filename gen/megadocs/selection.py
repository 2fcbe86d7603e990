"""Which generations a stream takes: those that are there and that the quality gates let pass."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gen.corpus.documents import Document
from gen.generations.by_document import Generations
from gen.generations.store import GenerationStore
from gen.megadocs.config import StreamConfig
from gen.megadocs.missing import Missing, missing_of
from gen.quality.gates import QualityConfig, advice, gates, select, strip_preamble
from gen.quality.table import columns_of, quality_table
from gen.work import Work


def choose_generations(
    stores: list[GenerationStore],
    generations: int,
    documents: list[Document],
    documents_hash: str,
    config: StreamConfig,
    quality: QualityConfig,
    tokenizer: Tokenizer | None,
    allotted: NDArray[np.int64] | None = None,
    work: Work | None = None,
) -> tuple[list[Generations], dict[str, Any], list[Missing]]:
    """What a stream takes of each store, what the quality gates found, and what is missing.

    Args:
        stores: one for each of the stream's methods.
        generations: G of each.
        documents: training documents in corpus order.
        documents_hash: their identity.
        config: shares, and what to do where generations are missing.
        quality: which generations are left out.
        tokenizer: of the corpus where these are thoughts, which it cuts for; else None.
        allotted: G of each document where they differ: int64 ``[documents]``.
        work: who judges what was not judged yet; None: this process and its children.

    Raises:
        FileNotFoundError: a store is empty.
        ValueError: G is larger than what was generated or imported.
    """
    judged: dict[str, Any] = {}
    chosen, lacking = [], []
    for place, store in enumerate(stores):
        counts = generations if allotted is None else allotted
        one = Generations.of_store(store, documents, counts)
        one.may_lack = store.imported
        if store.imported and max(one.found, default=0) < generations:
            raise ValueError(
                f"no document has G={generations} generations in {store.folder}; the most are "
                f"{max(one.found, default=0)}: set streams.generations to that or less"
            )
        if not store.imported:
            missing = missing_of(one, documents, store, tokenizer)
            missing.check(config.missing, config.missing_share)
            one.may_lack = True
            if missing.generations:
                lacking.append(missing)
        found = select_generations(one, store, documents, documents_hash, quality, work)
        judged = sum_of(judged, found) if judged else found
        if config.shares and tokenizer is None:
            one.take(takers(documents, config.methods[place], config.shares[place]))
        chosen.append(one)
    return chosen, judged, lacking


def takers(documents: list[Document], method: str, share: float) -> NDArray[np.bool_]:
    """Which documents take generations of a method: bool ``[documents]``, by a hash of their id.

    A larger share takes the documents of a smaller one and more.
    """
    keys = (f"{method}/{document.id}".encode() for document in documents)
    digests = (hashlib.blake2b(key, digest_size=8).digest() for key in keys)
    limit = share * 2**64
    return np.array([int.from_bytes(digest, "big") < limit for digest in digests], dtype=bool)


def sum_of(one: Any, other: Any) -> Any:
    """Counts of two stores together."""
    if isinstance(one, dict):
        return {name: sum_of(one[name], other[name]) for name in one}
    return one + other


def select_generations(
    generations: Generations,
    store: GenerationStore,
    documents: list[Document],
    documents_hash: str,
    quality: QualityConfig,
    work: Work | None,
) -> dict[str, Any]:
    """Drop what the quality gates say from ``generations``; returns the counts for the manifest."""
    allotted = generations.allotted
    table = quality_table(
        store, documents, documents_hash, quality.processes, work, with_documents=allotted
    )
    if allotted:
        table = table.filter(pc.less(table["index"], limits(generations, table, documents)))
    elif (pc.max(table["index"]).as_py() or 0) >= generations.count:
        table = table.filter(pc.less(table["index"], generations.count))
    columns = columns_of(table)
    failed = gates(columns, quality)
    selection = select(failed, quality)
    strip = quality.preamble == "strip"
    if strip:
        generations.select(selection.kept, failed["preamble"], strip_preamble)
    else:
        generations.select(selection.kept)
    return {
        "generations": len(selection.kept),
        "kept": int(selection.kept.sum()),
        "failed": selection.failed,
        "dropped": selection.dropped,
        "stripped": int((failed["preamble"] & selection.kept).sum()) if strip else 0,
    }


def limits(generations: Generations, table: pa.Table, documents: list[Document]) -> pa.Array:
    """G of the document of each row of a table."""
    ids = pa.array([document.id for document in documents])
    places = pc.index_in(table["document_id"], ids).to_numpy()
    return pa.array(generations.counts[places])


def describe_judged(judged: dict[str, Any]) -> str:
    """What the quality gates found, for the line about a stream."""
    if not judged:
        return ""
    found = [f"{count:,} {gate}" for gate, count in judged["failed"].items() if count]
    left_out = judged["generations"] - judged["kept"]
    return (
        f"; of {judged['generations']:,} generations {left_out:,} left out; "
        f"gates: {', '.join(found) or 'none failed'}"
        + "".join(f"\n  {line}" for line in advice(judged["failed"], judged["generations"]))
    )
