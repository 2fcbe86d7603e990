"""A table, figures and one self-contained HTML page from a folder of finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from trainer.config.schema import ENOUGH_READ
from trainer.pages import embedded, write_page
from trainer.study.benchmark_scores import benchmark_error
from trainer.study.figures import recipe_figures
from trainer.study.fits import answers, efficiency_text, law_figures, real_data_law
from trainer.study.page import Drawing, Missing, environment_line, write_csv, write_drawing
from trainer.study.paper import published_loss
from trainer.study.runs import Group, Run, Study, names_and_states, read_study


def write_report(folder: Path, output: Path) -> tuple[str, Path]:
    """Read the runs below ``folder`` and write figures, their numbers and the page to ``output``.

    Returns:
        The table as text, and the path of the HTML page.

    Raises:
        FileNotFoundError: no run is finished.
        ValueError: runs that cannot be compared, or a loss that is not a number.
    """
    study = read_study(folder)
    rows = [run_row(run, study.runs) for run in study.runs]
    costs = [compute_row(group) for group in study.groups]
    figures = [*recipe_figures(study), benchmark_error(study), *law_figures(study)]
    output.mkdir(parents=True, exist_ok=True)
    write_csv(output / "runs.csv", rows)
    write_csv(output / "compute.csv", costs)
    drawings = [one for one in figures if isinstance(one, Drawing)]
    path = output / "report.html"
    write_page(
        path,
        Path(__file__).with_suffix(".html"),
        title=f"Megadocs: runs in {folder}",
        evaluation=study.runs[0].result["evaluation"],
        near_duplicates=near_duplicates_text(study),
        cautions=study.different_data,
        unfinished=names_and_states(study.unfinished),
        runs=rows,
        best=best_run(study.runs),
        drawings=[(one, embedded(write_drawing(one, output))) for one in drawings],
        costs=costs,
        certificates=certificates(study),
        missing=[one for one in figures if isinstance(one, Missing)],
        footer=environment_line(study.runs[0].path),
    )
    if not study.different_data:
        rows = [{name: cell for name, cell in row.items() if name != "data"} for row in rows]
    text = tabulate(rows, "keys", "plain", stralign="right", disable_numparse=True, missingval="-")
    if near := near_duplicates_text(study):
        text += f"\n{near}"
    text += "".join(f"\ncaution: {difference}" for difference in study.different_data)
    if study.unfinished:
        text += f"\nnot finished, left out: {names_and_states(study.unfinished)}"
    return text, path


def answer_data_efficiency(folder: Path) -> str:
    """How many times more real data each recipe is worth, with certainty and cost.

    Raises:
        ValueError: the runs do not hold what the question needs; says what is missing.
    """
    study = read_study(folder)
    law = real_data_law(study)
    text = efficiency_text(answers(study, law), law)
    return text + "".join(f"\n  caution: {difference}" for difference in study.different_data)


def best_run(runs: Sequence[Run]) -> int:
    return min(range(len(runs)), key=lambda index: runs[index].loss)


def run_row(run: Run, runs: Sequence[Run]) -> dict[str, str]:
    """A run in the table; the difference is to the best real-only run of the same setting."""
    recipe, loss = run.config.recipe, run.result["loss"]
    real = [other.loss for other in runs if other.kind == "real" and other.setting == run.setting]
    data = run.config.data
    published = published_loss(run.kind, run.generations, data.mask.value, data.context_length)
    return {
        "recipe": run.kind,
        "G": str(run.generations or "-"),
        "mask": data.mask.value,
        "w": f"{recipe.mixing_fraction:g}",
        "epochs": epochs_of(run),
        "lr": f"{recipe.learning_rate:g}",
        "wd": f"{recipe.weight_decay:g}",
        "seed": str(run.config.seed),
        "data": run.training_data,
        "real tokens": "-" if run.alone else f"{run.real_tokens:,}",
        "steps": f"{run.result['steps']:,}",
        "tokens": f"{run.tokens:,}",
        **{("loss" if name == "iid" else name): f"{value:.4f}" for name, value in loss.items()},
        "bits/byte": f"{run.result['bits_per_byte']:.4f}",
        "vs real": f"{run.loss - min(real):+.4f}" if real else "-",
        "paper": f"{published:g}" if published else "-",
    }


def epochs_of(run: Run) -> str:
    """The epochs that were asked for, and those that were read where they are fewer."""
    asked, read = run.config.recipe.epochs, run.epochs_read
    return f"{asked:g}" + (f" ({read:.2f} read)" if read < ENOUGH_READ * asked else "")


def compute_row(group: Group) -> dict[str, str]:
    """What one configuration costs, a seed."""
    run, recipe = group.first, group.first.config.recipe
    hours = sum(one.hours for one in group.runs) / len(group.runs)
    return {
        "recipe": run.kind,
        "G": str(run.generations or "-"),
        "parameters": f"{run.result['parameters']:,}",
        "real tokens": "-" if run.alone else f"{run.real_tokens:,}",
        "mask": run.config.data.mask.value,
        "context": f"{run.config.data.context_length:,}",
        "epochs": f"{recipe.epochs:g}",
        "w": f"{recipe.mixing_fraction:g}",
        "lr": f"{recipe.learning_rate:g}",
        "wd": f"{recipe.weight_decay:g}",
        "tokens trained": f"{run.tokens:,}",
        "real tokens seen": "-" if run.alone else f"{run.real_tokens_seen:,}",
        "synthetic passes": f"{run.synthetic_passes:.2f}",
        "FLOPs": f"{run.flops:.3g}",
        "hours": f"{hours:.4g} {run.device}",
        "generated tokens": "-" if run.alone else f"{run.generation_tokens:,}",
        "seeds": str(len(group.runs)),
        "loss": f"{group.mean():.4f}",
        "SD": f"{group.spread():.4f}" if len(group.runs) > 1 else "-",
    }


def near_duplicates_text(study: Study) -> str:
    """How many of the held-out documents training knows nearly word for word, where it is known."""
    told = [run.result["evaluation"].get("near_duplicates") for run in study.runs]
    if not (shares := sorted({share for share in told if share is not None})):
        return ""
    end = "of the held-out documents have a near-duplicate in training"
    if len(shares) == 1:
        return f"{shares[0]:.1%} {end}"
    return f"{shares[0]:.1%} to {shares[-1]:.1%}, by run, {end}"


def certificates(study: Study) -> list[dict[str, str]]:
    """The star searches: optimum, the closest neighbour, axes that end at it."""
    rows = []
    read = {run.training_data for run in study.runs}
    for found in study.certificates:
        data = found.get("data", "")  # of older versions unknown
        margins = [one["margin"] for one in found["neighbours"] if one["margin"] is not None]
        rows.append(
            {
                "search": " ".join(one for one in found["study"] if one.startswith("recipe")),
                "optimum": ", ".join(f"{key}={value:g}" for key, value in found["optimum"].items()),
                "loss": f"{found['loss']:.4f}",
                "neighbours beaten": str(len(found["neighbours"])),
                "by at least": f"{min(margins):.4f}" if margins else "-",
                "on the edge": ", ".join(one["axis"] for one in found["edges"]) or "-",
                "runs": str(found["runs"]),
                "data": data + (" (no run here)" if data and data not in read else "") or "-",
            }
        )
    return rows
