"""A page to judge a corpus by before training on it: counts, distributions, random samples."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tabulate import tabulate

from gen.corpus.documents import Document
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
from gen.quality.table import StoredRows, columns_of, quality_table
from trainer.pages import embedded, png_of, write_page

OPENING = 8  # words; how often generations open alike shows a collapsed template
OPENINGS = 20_000  # generations whose openings are looked at


@dataclass(frozen=True)
class Judged:
    """A store with its verdicts, by document in corpus order, then by index; texts are not here."""

    store: GenerationStore
    columns: dict[str, NDArray[Any]]  # measures, each [rows]
    failed: dict[str, NDArray[np.bool_]]  # bool [rows] by gate
    selection: Selection
    source: NDArray[np.integer[Any]]  # place of each row's document, [rows]
    documents: list[Document]
    stored: StoredRows

    def texts(self, rows: NDArray[np.integer[Any]]) -> dict[int, str]:
        """The texts of some rows, read from the store."""
        found = self.stored.texts(self.stored.order[rows])
        return {row: found[int(self.stored.order[row])] for row in rows.tolist()}

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
    told = advice(judged.selection.failed, len(judged.source))
    settings = store.settings()
    sampled, failing, opened = samples(judged, config), examples(judged, config), opening(judged)
    shown = [rows for _, rows in sampled] + [rows for _, _, rows in failing]
    texts = judged.texts(np.unique(np.concatenate([opened, *shown])))
    write_page(
        path,
        Path(__file__).with_suffix(".html"),
        title=f"Generations in {store.folder}",
        generations=len(judged.source),
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
        openings=openings([texts[row] for row in opened.tolist()]),
        samples=[pair(judged, texts, place, rows) for place, rows in sampled],
        examples=[
            (gate, count, [pair(judged, texts, int(judged.source[row]), [row]) for row in rows])
            for gate, count, rows in failing
        ],
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
    stored = StoredRows(store, documents)
    if len(stored.order) != table.num_rows:
        raise ValueError(f"{store.folder} grew meanwhile: run the same command again")
    source = stored.place[stored.order]
    return Judged(store, columns, failed, select(failed, quality), source, documents, stored)


def gate_rows(judged: Judged, quality: QualityConfig) -> list[list[str]]:
    """Gate, failed, share, policy and dropped, under a head."""
    total = len(judged.source)
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


def opening(judged: Judged) -> NDArray[np.integer[Any]]:
    """Rows whose openings are looked at: all of a small store, else a random sample."""
    rows = np.arange(len(judged.source))
    if len(rows) > OPENINGS:
        rows = np.random.default_rng(0).choice(rows, OPENINGS, replace=False)
    return rows


def openings(texts: list[str]) -> list[tuple[str, float]]:
    """The most frequent first eight words and their share of the texts."""
    counts = Counter(" ".join(WORD.findall(text[:400].lower())[:OPENING]) for text in texts)
    return [(words, count / len(texts)) for words, count in counts.most_common(5) if count > 1]


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


def samples(judged: Judged, config: ReportConfig) -> list[tuple[int, list[int]]]:
    """Places of random documents with the rows of their first generations."""
    places = np.unique(judged.source).tolist()
    drawn = random.Random(config.seed).sample(places, min(config.samples, len(places)))
    starts = np.searchsorted(judged.source, drawn).tolist()
    ends = np.searchsorted(judged.source, drawn, "right").tolist()
    return [
        (place, list(range(start, end))[: config.siblings])
        for place, start, end in zip(drawn, starts, ends, strict=True)
    ]


def examples(judged: Judged, config: ReportConfig) -> list[tuple[str, int, list[int]]]:
    """Gate, how many failed it, and the rows of random ones of these."""
    chooser = random.Random(config.seed)
    found = []
    for gate in GATES:
        rows: list[int] = np.flatnonzero(judged.failed[gate]).tolist()
        if rows:
            found.append((gate, len(rows), chooser.sample(rows, min(config.examples, len(rows)))))
    return found


def pair(judged: Judged, texts: dict[int, str], place: int, rows: list[int]) -> dict[str, Any]:
    """A document and some of its generations, with measures and the gates they failed."""
    measures = ("index", "words", "copied")
    return {
        "document": judged.documents[place],
        "generations": [
            {
                **{name: judged.columns[name][row] for name in measures},
                "badges": judged.badges(row),
                "text": texts[row],
            }
            for row in rows
        ],
    }
