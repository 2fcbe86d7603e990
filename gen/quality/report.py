"""A page to judge a corpus by before training on it: counts, distributions, random samples."""

from __future__ import annotations

import base64
import html
import io
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from gen.corpus.documents import Document
from gen.generations.failures import all_failures, describe_reasons
from gen.generations.store import GenerationStore
from gen.megadocs.assembly import TEXT_COLUMNS, Generations
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
from trainer.files import read_json, replace_file

OPENING = 8  # words; how often generations open alike shows a collapsed template


@dataclass(frozen=True)
class Judged:
    """A store with its verdicts; arrays are aligned with the rows of ``table``."""

    store: GenerationStore
    table: pa.Table  # document_id and measures
    columns: dict[str, np.ndarray]
    failed: dict[str, np.ndarray]  # bool [rows] by gate
    selection: Selection
    source: np.ndarray  # place of each row's document, [rows]
    documents: list[Document]
    texts: Generations

    def text(self, row: int) -> str:
        return self.texts.of(int(self.source[row]))[int(self.columns["index"][row])]

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
    images = {
        title: embed(histogram(title, label, values))
        for title, label, values in distributions(judged)
    }
    page = render(judged, quality, config, images)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    rows = gate_rows(judged, quality)
    lines = ["".join(f"{cell:>12}" for cell in row) for row in rows]
    return "\n".join(lines + advice(judged.selection.failed, judged.table.num_rows))


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
    texts = Generations(store.read(TEXT_COLUMNS), documents, highest, str(store.folder))
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


def distributions(judged: Judged) -> list[tuple[str, str, np.ndarray]]:
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


def histogram(title: str, label: str, values: np.ndarray) -> Figure:
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


def embed(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


def openings(judged: Judged, limit: int = 20_000) -> list[tuple[str, float]]:
    """The most frequent first eight words and their share of the generations (of a sample)."""
    rows = np.arange(judged.table.num_rows)
    if len(rows) > limit:
        rows = np.random.default_rng(0).choice(rows, limit, replace=False)
    counts = Counter(
        " ".join(WORD.findall(judged.text(int(row))[:400].lower())[:OPENING]) for row in rows
    )
    return [(words, count / len(rows)) for words, count in counts.most_common(5) if count > 1]


STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
.figures { display: flex; flex-wrap: wrap; gap: .5rem; }
.figures img { width: 24rem; max-width: 100%; background: white; border-radius: 6px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1.5rem; margin-bottom: 1.5rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 26rem; overflow-y: auto;
  border-left: 3px solid #8884; padding-left: .8rem; font-size: .9rem; margin-bottom: 1rem; }
.badge { background: #ee6677; color: white; border-radius: 4px; padding: 0 .4rem; font-size: .8rem;
  margin-right: .3rem; }
@media (max-width: 50rem) { .pair { grid-template-columns: 1fr; } }
"""


def render(judged: Judged, quality: QualityConfig, config: ReportConfig, images: dict) -> str:
    """The page, images and style inside it."""
    title = f"Generations in {judged.store.folder}"
    settings = read_json(judged.store.folder / "manifest.json")
    described = ", ".join(f"{name} {value}" for name, value in settings.items())
    figures = "".join(
        f'<img alt="{html.escape(name)}" src="data:image/png;base64,{png}">'
        for name, png in images.items()
    )
    documents = len(np.unique(judged.source))
    told = advice(judged.selection.failed, judged.table.num_rows)
    alike = "".join(
        f"<tr><td>{html.escape(words)}</td><td>{share:.2%}</td></tr>"
        for words, share in openings(judged)
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p>{judged.table.num_rows:,} generations of {documents:,} of {len(judged.documents):,} training
documents. {html.escape(described)}.</p>
<h2>Gates</h2>
<p>A generation may fail several gates; it counts as dropped by the first one that drops it.</p>
{html_table(gate_rows(judged, quality))}
{"".join(f"<p>{html.escape(line)}.</p>" for line in told)}
<h2>Missing</h2><p>{html.escape(describe_missing(judged.store))}</p>
<h2>Distributions</h2><div class="figures">{figures}</div>
<h2>Most frequent openings</h2>
<table>{alike or "<tr><td>no two generations open with the same eight words</td></tr>"}</table>
<h2>Random documents</h2>{samples(judged, config)}
<h2>Examples of what the gates found</h2>{examples(judged, config)}
</body></html>
"""


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


def html_table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows[1:]
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def samples(judged: Judged, config: ReportConfig) -> str:
    """Random documents on the left, their first generations on the right."""
    places = np.unique(judged.source).tolist()
    drawn = random.Random(config.seed).sample(places, min(config.samples, len(places)))
    return "".join(
        pair(judged, place, np.flatnonzero(judged.source == place)[: config.siblings].tolist())
        for place in drawn
    )


def examples(judged: Judged, config: ReportConfig) -> str:
    """Random failures of each gate beside their documents."""
    chooser = random.Random(config.seed)
    parts = []
    for gate in GATES:
        rows: list[int] = np.flatnonzero(judged.failed[gate]).tolist()
        if rows:
            parts.append(f"<h3>{gate}: {len(rows):,}</h3>")
            for row in chooser.sample(rows, min(config.examples, len(rows))):
                parts.append(pair(judged, int(judged.source[row]), [row]))
    return "".join(parts) or "<p>No generation failed a gate.</p>"


def pair(judged: Judged, place: int, rows: list[int]) -> str:
    """A document beside some of its generations."""
    document = judged.documents[place]
    right = "".join(generation(judged, row) for row in rows)
    return (
        f'<div class="pair"><div><h3>{html.escape(document.id)}</h3>'
        f'<div class="text">{html.escape(document.text)}</div></div><div>{right}</div></div>'
    )


def generation(judged: Judged, row: int) -> str:
    """A generation with its measures and the gates it failed."""
    measures: dict[str, Any] = {name: column[row] for name, column in judged.columns.items()}
    badges = "".join(f'<span class="badge">{gate}</span>' for gate in judged.badges(row))
    return (
        f"<h3>generation {measures['index']}: {measures['words']} words, "
        f"{measures['copied']:.0%} copied {badges}</h3>"
        f'<div class="text">{html.escape(judged.text(row))}</div>'
    )
