"""A table, figures and one self-contained HTML page from a folder of finished runs."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from trainer.config import TrainConfig, load_config

matplotlib.use("agg")

COLOURS = {"simple": "#4477aa", "stitched": "#ee6677", "latent": "#228833", "real": "#777777"}


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    config: TrainConfig
    result: dict[str, Any]
    metrics: list[dict[str, float]]

    @property
    def kind(self) -> str:
        """``real``, or the kind of the synthetic stream with its variant."""
        return self.config.recipe.stream or self.config.recipe.base

    @property
    def generations(self) -> int:
        return self.config.recipe.generations if self.config.recipe.stream else 0

    @property
    def loss(self) -> float:
        """i.i.d. validation loss, nats per token."""
        return self.result["loss"]["iid"]


def write_report(folder: Path, output: Path) -> tuple[str, Path]:
    """Read the runs below ``folder`` and write figures and page to ``output``.

    Returns:
        The table as text, and the path of the HTML page.

    Raises:
        FileNotFoundError: no run is finished.
        ValueError: runs that cannot be compared, or a loss that is not a number.
    """
    runs, unfinished = read_runs(folder)
    check_comparable(runs)
    rows = table_rows(runs)
    figures = {
        "loss-by-generations": ("Loss by generations per document", plot_generations(runs)),
        "loss-by-position": ("Loss by position in the document", plot_positions(runs)),
        "training": ("Training loss", plot_training(runs)),
    }
    output.mkdir(parents=True, exist_ok=True)
    images = {}
    for name, (title, figure) in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
        (output / f"{name}.png").write_bytes(buffer.getvalue())
        images[title] = buffer.getvalue()
    page = output / "report.html"
    page.write_text(render_page(folder, runs, rows, images, unfinished))
    text = format_table(rows)
    if unfinished:
        text += "\nnot finished, left out: " + ", ".join(path.name for path in unfinished)
    return text, page


def read_runs(folder: Path) -> tuple[list[Run], list[Path]]:
    """Finished runs below ``folder``, real first, and the folders of unfinished ones."""
    found = sorted(path.parent for path in folder.rglob("config.yaml"))
    finished = [path for path in found if (path / "result.json").exists()]
    unfinished = [path for path in found if path not in finished]
    if not finished:
        raise FileNotFoundError(
            f"{folder} holds no finished run ({len(unfinished)} unfinished); train with "
            "python train.py first"
        )
    runs = []
    for path in finished:
        lines = (path / "metrics.jsonl").read_text().splitlines()
        runs.append(
            Run(
                path,
                load_config(path / "config.yaml"),
                json.loads((path / "result.json").read_text()),
                [json.loads(line) for line in lines],
            )
        )
    return sorted(runs, key=lambda run: (run.kind != "real", run.kind, run.generations)), unfinished


def check_comparable(runs: Sequence[Run]) -> None:
    """Raise ValueError where losses of different things would stand in one table."""
    for run in runs:
        if not math.isfinite(run.loss):
            raise ValueError(f"{run.path} has the loss {run.loss}; leave that run out or redo it")
    first = runs[0]
    for run in runs[1:]:
        for key in ("tokenizer_sha256", "stream", "documents", "tokens"):
            ours, theirs = first.result["evaluation"][key], run.result["evaluation"][key]
            same_reading = (
                first.config.data.mask == run.config.data.mask
                and first.config.data.context_length == run.config.data.context_length
            )
            if ours != theirs and (key != "tokens" or same_reading):
                raise ValueError(
                    f"{run.path} was evaluated with {key}={theirs}, {first.path} with {ours}: "
                    "their losses cannot be compared; report them apart"
                )


def table_rows(runs: Sequence[Run]) -> list[dict[str, str]]:
    """One row a run, the difference to the best real-only run last."""
    real = [run.loss for run in runs if run.kind == "real"]
    rows = []
    for run in runs:
        recipe, loss = run.config.recipe, run.result["loss"]
        tokens = sum(run.result["tokens_seen"].values())
        rows.append(
            {
                "recipe": run.kind,
                "G": str(run.generations or "-"),
                "mask": run.config.data.mask.value,
                "w": f"{recipe.mixing_fraction:g}",
                "epochs": f"{recipe.epochs:g}",
                "lr": f"{recipe.learning_rate:g}",
                "wd": f"{recipe.weight_decay:g}",
                "seed": str(run.config.seed),
                "steps": f"{run.result['steps']:,}",
                "tokens": f"{tokens:,}",
                "loss": f"{loss['iid']:.4f}",
                "short": f"{loss['short']:.4f}" if "short" in loss else "-",
                "long": f"{loss['long']:.4f}" if "long" in loss else "-",
                "bits/byte": f"{run.result['bits_per_byte']:.4f}",
                "vs real": f"{loss['iid'] - min(real):+.4f}" if real else "-",
            }
        )
    return rows


def format_table(rows: Sequence[dict[str, str]]) -> str:
    """The rows as aligned text."""
    names = list(rows[0])
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    lines = ["  ".join(name.rjust(widths[name]) for name in names)]
    lines += ["  ".join(row[name].rjust(widths[name]) for name in names) for row in rows]
    return "\n".join(lines)


def new_figure(xlabel: str, ylabel: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.4, 4.0))
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def colour(kind: str) -> str:
    return COLOURS.get(kind.partition("-")[0], "#aa3377")


def plot_generations(runs: Sequence[Run]) -> Figure:
    """Loss against G, a line a recipe; several seeds give mean and standard deviation."""
    figure, axes = new_figure("generations per document (G)", "validation loss (nats per token)")
    points: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        points[run.kind][run.generations].append(run.loss)
    for kind, by_g in points.items():
        if kind == "real":
            best = min(min(losses) for losses in by_g.values())
            axes.axhline(best, color=colour(kind), linestyle="--", label="real only")
            continue
        g = sorted(by_g)
        means = [statistics.mean(by_g[count]) for count in g]
        spread = [statistics.stdev(by_g[count]) if len(by_g[count]) > 1 else 0.0 for count in g]
        axes.errorbar(g, means, spread, marker="o", capsize=3, color=colour(kind), label=kind)
    counts = sorted({run.generations for run in runs if run.generations})
    if counts:
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
    axes.legend(frameon=False)
    return figure


def plot_positions(runs: Sequence[Run]) -> Figure:
    """Loss against the position in the held-out document."""
    figure, axes = new_figure("position in the document (tokens)", "loss (nats per token)")
    for run in runs:
        pairs = [(int(place), loss) for place, loss in run.result["loss_by_position"].items()]
        places, losses = zip(*[pair for pair in pairs if pair[0] > 0], strict=True)
        axes.plot(places, losses, marker=".", color=colour(run.kind), label=run_label(run))
    axes.set_xscale("log", base=2)
    axes.legend(frameon=False, fontsize="small")
    return figure


def plot_training(runs: Sequence[Run]) -> Figure:
    """Training and validation loss over the run."""
    figure, axes = new_figure("share of the run", "loss (nats per token)")
    for run in runs:
        for key, style in (("train/loss", "-"), ("eval/iid", ":")):
            points = [(row["step"], row[key]) for row in run.metrics if key in row]
            if points:
                steps, losses = zip(*points, strict=True)
                axes.plot(
                    [step / run.result["steps"] for step in steps],
                    losses,
                    style,
                    color=colour(run.kind),
                    label=run_label(run) if key == "train/loss" else None,
                )
    axes.plot([], [], ":", color="black", label="validation")
    axes.legend(frameon=False, fontsize="small")
    return figure


def run_label(run: Run) -> str:
    return f"{run.kind} G={run.generations}" if run.generations else run.kind


STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
tr.best td { font-weight: 600; }
img { max-width: 100%; background: white; border-radius: 6px; }
footer { margin: 2rem 0; opacity: .7; font-size: .9rem; }
"""


def render_page(
    folder: Path,
    runs: Sequence[Run],
    rows: Sequence[dict[str, str]],
    images: dict[str, bytes],
    unfinished: Sequence[Path],
) -> str:
    """The page, images and style inside it."""
    best = min(range(len(runs)), key=lambda index: runs[index].loss)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "".join(
        f"<tr{' class=best' if index == best else ''}>"
        + "".join(f"<td>{html.escape(value)}</td>" for value in row.values())
        + "</tr>"
        for index, row in enumerate(rows)
    )
    figures = "".join(
        f"<h2>{html.escape(title)}</h2>"
        f'<img alt="{html.escape(title)}" src="data:image/png;base64,'
        f'{base64.b64encode(png).decode()}">'
        for title, png in images.items()
    )
    evaluation = runs[0].result["evaluation"]
    left_out = (
        f"<p>Not finished and left out: {html.escape(', '.join(p.name for p in unfinished))}.</p>"
        if unfinished
        else ""
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Megadocs: {html.escape(folder.name)}</title><style>{STYLE}</style></head><body>
<h1>Runs in {html.escape(str(folder))}</h1>
<p>Losses in nats per token on {evaluation["documents"]} held-out documents; documents of up to
{evaluation["short_up_to"]:,} tokens (the median) count as short. The best run is bold.</p>
{left_out}
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
{figures}
<footer>{html.escape(environment_line(runs[0].path))}</footer>
</body></html>
"""


def environment_line(run: Path) -> str:
    """What the first run was made with."""
    path = run / "environment.json"
    if not path.exists():
        return ""
    return ", ".join(f"{name} {value}" for name, value in json.loads(path.read_text()).items())
