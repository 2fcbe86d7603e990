"""A page to judge a corpus by before training on it: counts, distributions, random samples."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tabulate import tabulate

from gen.corpus.documents import Document
from gen.generations.by_document import TEXT_COLUMNS, Generations
from gen.generations.failures import all_failures, describe_reasons
from gen.generations.store import GenerationStore
from gen.quality.gates import (
    GATES,
    WORD,
    QualityConfig,
    ReportConfig,
    Selection,
    advice,
    gates,
    select,
)
from gen.quality.table import columns_of, quality_table
from trainer.pages import embedded, png_of, write_page

OPENING = 8  # words; how often generations open alike shows a collapsed template


@dataclass(frozen=True)
class Judged:
    """A store with its verdicts; arrays are aligned with the rows of ``table``."""

    store: GenerationStore
    table: pa.Table  # document_id and measures
    columns: dict[str, NDArray[Any]]
    failed: dict[str, NDArray[np.bool_]]  # bool [rows] by gate
    selection: Selection
    source: NDArray[np.int64]  # place of each row's document, [rows]
    documents: list[Document]
    texts: Generations

    def text(self, row: int) -> str:
        position = self.texts.of_document(int(self.source[row]))[int(self.columns["index"][row])]
        return self.texts.text(position)

    def badges(self, row: int) -> list[str]:
        return [gate for gate in GATES if self.failed[gate][row]]


def write_quality_report(
    store: GenerationStore,
    documents: list[Document],
    documents_hash: str,
    quality: QualityConfig,
    config: ReportConfig,
    path: Path,
) -> str:
    """Write one HTML file that needs nothing else; returns the table of gates as text.

    Raises:
        FileNotFoundError: the store is empty.
        ValueError: no generation belongs to these documents.
    """
    judged = judge(store, documents, documents_hash, quality)
    head, *rows = gate_rows(judged, quality)
    told = advice(judged.selection.failed, judged.table.num_rows)
    settings = store.settings()
    write_page(
        path,
        Path(__file__).with_suffix(".html"),
        title=f"Generations in {store.folder}",
        generations=judged.table.num_rows,
        judged=len(np.unique(judged.source)),
        documents=len(documents),
        described=", ".join(f"{name} {value}" for name, value in settings.items()),
        gates=[dict(zip(head, row, strict=True)) for row in rows],
        told=told,
        missing=describe_missing(store),
        images={
            title: embedded(png_of(histogram(title, label, values), dpi=110))
            for title, label, values in distributions(judged)
        },
        openings=openings(judged),
        samples=samples(judged, config),
        examples=examples(judged, config),
    )
    table = tabulate(rows, head, "plain", stralign="right", disable_numparse=True)
    return "\n".join([table, *told])


def judge(
    store: GenerationStore, documents: list[Document], documents_hash: str, quality: QualityConfig
) -> Judged:
    """Measure the store and apply gates and policies."""
    table = quality_table(store, documents, documents_hash, quality.processes)
    if not table.num_rows:
        raise ValueError(
            f"{store.folder} holds no generation of these documents; check root=... and corpus=..."
        )
    columns = columns_of(table)
    failed = gates(columns, quality)
    rank = {document.id: place for place, document in enumerate(documents)}
    source = np.array([rank[name] for name in table["document_id"].to_pylist()])
    highest = int(columns["index"].max()) + 1
    texts = Generations.of_table(store.read(TEXT_COLUMNS), documents, highest, str(store.folder))
    return Judged(store, table, columns, failed, select(failed, quality), source, documents, texts)


def gate_rows(judged: Judged, quality: QualityConfig) -> list[list[str]]:
    """Gate, failed, share, policy and dropped, under a head."""
    total = judged.table.num_rows
    rows = [["gate", "failed", "share", "policy", "dropped"]]
    for gate in GATES:
        failed = judged.selection.failed[gate]
        dropped = judged.selection.dropped.get(gate, 0)
        rows.append(
            [gate, f"{failed:,}", f"{failed / total:.2%}", getattr(quality, gate), f"{dropped:,}"]
        )
    kept = int(judged.selection.kept.sum())
    rows.append(["kept", f"{kept:,}", f"{kept / total:.2%}", "", f"{total - kept:,}"])
    return rows


def distributions(judged: Judged) -> list[tuple[str, str, NDArray[Any]]]:
    """Title, axis label and values of each histogram."""
    columns = judged.columns
    lengths = np.array([len(WORD.findall(document.text)) for document in judged.documents])
    ratio = columns["words"] / np.maximum(1, lengths[judged.source])
    siblings = columns["similarity"][columns["index"] > 0]
    return [
        ("Length of generations", "words", columns["words"]),
        ("Length of documents", "words", lengths),
        ("Length of generation over length of document", "ratio", ratio),
        ("Copied from the document", "share of 8-grams", columns["copied"]),
        ("Likeness to the nearest earlier sibling", "Jaccard index of 5-grams", siblings),
        ("Repeated inside a generation", "share of 4-grams seen before", columns["repeated"]),
        ("Compression", "zlib bytes per byte", np.minimum(columns["compression"], 1.5)),
    ]


def histogram(title: str, label: str, values: NDArray[Any]) -> Figure:
    """A histogram with its median; the long tail above the 99.5th percentile in the last bin."""
    figure = Figure(figsize=(5.0, 2.8), layout="constrained")
    axes = figure.subplots()
    if len(values):
        high = max(float(np.quantile(values, 0.995)), 1e-9)
        axes.hist(np.minimum(values, high), bins=50, range=(0.0, high), color="#4477aa")
        median = float(np.median(values))
        axes.axvline(median, color="#ee6677")
        axes.set_title(f"{title} (median {median:.3g})", fontsize="medium")
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def openings(judged: Judged, limit: int = 20_000) -> list[tuple[str, float]]:
    """The most frequent first eight words and their share of the generations (of a sample)."""
    rows = np.arange(judged.table.num_rows)
    if len(rows) > limit:
        rows = np.random.default_rng(0).choice(rows, limit, replace=False)
    counts = Counter(
        " ".join(WORD.findall(judged.text(int(row))[:400].lower())[:OPENING]) for row in rows
    )
    return [(words, count / len(rows)) for words, count in counts.most_common(5) if count > 1]


def describe_missing(store: GenerationStore) -> str:
    """How many generations the latest jobs could not make, and why."""
    failures = all_failures(store.folder)
    if not failures:
        return "No generation failed in the latest job."
    reasons = Counter(failure.reason for failure in failures.values())
    examples = "; ".join(
        f"{document_id}#{index}: {failure.problem[:200]}"
        for (document_id, index), failure in list(failures.items())[:5]
    )
    return f"Failed: {describe_reasons(dict(reasons.most_common()))}. {examples}"


def samples(judged: Judged, config: ReportConfig) -> list[dict[str, Any]]:
    """Random documents beside their first generations."""
    places = np.unique(judged.source).tolist()
    drawn = random.Random(config.seed).sample(places, min(config.samples, len(places)))
    return [
        pair(judged, place, np.flatnonzero(judged.source == place)[: config.siblings].tolist())
        for place in drawn
    ]


def examples(judged: Judged, config: ReportConfig) -> list[tuple[str, int, list[dict[str, Any]]]]:
    """Gate, how many failed it, and random ones of these beside their documents."""
    chooser = random.Random(config.seed)
    found = []
    for gate in GATES:
        rows: list[int] = np.flatnonzero(judged.failed[gate]).tolist()
        if rows:
            drawn = chooser.sample(rows, min(config.examples, len(rows)))
            found.append(
                (gate, len(rows), [pair(judged, int(judged.source[row]), [row]) for row in drawn])
            )
    return found


def pair(judged: Judged, place: int, rows: list[int]) -> dict[str, Any]:
    """A document and some of its generations, with measures and the gates they failed."""
    measures = ("index", "words", "copied")
    return {
        "document": judged.documents[place],
        "generations": [
            {
                **{name: judged.columns[name][row] for name in measures},
                "badges": judged.badges(row),
                "text": judged.text(row),
            }
            for row in rows
        ],
    }
