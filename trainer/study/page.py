"""Figures of the report as PNG and CSV, drawn alike."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from trainer.data.format import VARIANTS
from trainer.files import optional, read_sealed
from trainer.pages import png_of

matplotlib.use("agg")

COLOURS = {
    "real": "#777777",
    "simple": "#4477aa",
    "stitched": "#ee6677",
    "latent": "#228833",
    "self": "#ccbb44",
}
MARKERS = {VARIANTS["first"]: "s", VARIANTS["absent"]: "^"}


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
    png = png_of(drawing.figure, dpi=150)
    (output / f"{drawing.name}.png").write_bytes(png)
    write_csv(output / f"{drawing.name}.csv", drawing.rows)
    return png


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows as CSV; a column for every key that one of them has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows(rows)


def environment_line(run: Path) -> str:
    """What a run was made with."""
    found = optional(run / "environment.json", read_sealed) or {}
    return ", ".join(f"{name} {value}" for name, value in found.items())
