"""The report as files: figures as PNG and CSV, and one HTML page with everything inside it."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

matplotlib.use("agg")

COLOURS = {
    "real": "#777777",
    "simple": "#4477aa",
    "stitched": "#ee6677",
    "latent": "#228833",
    "self": "#ccbb44",
}
MARKERS = {"real-first": "s", "no-real": "^"}


@dataclass(frozen=True)
class Drawing:
    """A figure, the numbers in it, and what a reader must know."""

    name: str  # file name without an ending
    title: str
    figure: Figure
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Missing:
    """A figure the runs do not support, and what would."""

    title: str
    reason: str


def new_figure(
    xlabel: str, ylabel: str = "validation loss (nats per token)", panels: int = 1
) -> tuple[Figure, list[Any]]:
    """A figure with ``panels`` axes side by side; the second one is for published values."""
    figure = Figure(figsize=(6.4 if panels == 1 else 10.5, 4.0), layout="constrained")
    found = [figure.add_subplot(1, panels, place + 1) for place in range(panels)]
    for axes in found:
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if panels == 2:
        found[0].set_title("these runs", fontsize="medium")
        found[1].set_title("published: 300M, 204M tokens of DCLM", fontsize="medium")
    return figure, found


def colour(kind: str) -> str:
    return COLOURS.get(re.split(r"[-\s]", kind)[0], "#aa3377")


def line_style(kind: str, generations: int) -> Any:
    """Variants are dotted; the more generations the longer the dashes."""
    if "-" in kind or " " in kind:
        return ":"
    return (0, (generations, 2)) if generations else "-"


def marker(kind: str) -> str:
    return next((shape for part, shape in MARKERS.items() if part in kind), "o")


def log_ticks(axes: Any, values: Sequence[float]) -> None:
    """A base-2 axis with a tick at every value that occurs."""
    ticks = sorted(set(values))
    if ticks:
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()


def legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize="small")


def write_drawing(drawing: Drawing, output: Path) -> bytes:
    """``NAME.png`` and ``NAME.csv``; returns the PNG."""
    buffer = io.BytesIO()
    drawing.figure.savefig(buffer, format="png", dpi=150)
    (output / f"{drawing.name}.png").write_bytes(buffer.getvalue())
    write_csv(output / f"{drawing.name}.csv", drawing.rows)
    return buffer.getvalue()


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows(rows)


STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
tr.best td { font-weight: 600; }
img { max-width: 100%; background: white; border-radius: 6px; }
pre { overflow-x: auto; font-size: .85rem; }
.note { font-size: .9rem; }
footer { margin: 2rem 0; opacity: .7; font-size: .9rem; }
"""


def table(rows: Sequence[dict[str, str]], best: int | None = None) -> str:
    """Rows as an HTML table, one of them bold."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr{' class=best' if index == best else ''}>"
        + "".join(f"<td>{html.escape(row.get(name, '-'))}</td>" for name in names)
        + "</tr>"
        for index, row in enumerate(rows)
    )
    content = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table>{content}</table></div>'


def figure_section(drawing: Drawing, png: bytes) -> str:
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in drawing.notes)
    title = html.escape(drawing.title)
    image = base64.b64encode(png).decode()
    return f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{image}">{notes}'


def page(title: str, sections: Sequence[str], footer: str) -> str:
    """The page, images and style inside it."""
    body = "\n".join(sections)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{body}
<footer>{html.escape(footer)}</footer>
</body></html>
"""


def environment_line(run: Path) -> str:
    """What a run was made with."""
    path = run / "environment.json"
    if not path.exists():
        return ""
    return ", ".join(f"{name} {value}" for name, value in json.loads(path.read_text()).items())
