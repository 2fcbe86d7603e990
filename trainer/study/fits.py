"""The paper's fitted figures: ensembles, parameters, real data, repetition; data efficiency."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.study import paper
from trainer.study.figures import label_of, row
from trainer.study.laws import POWER, REPEATED_DATA
from trainer.study.page import Drawing, Missing, colour, legend, log_ticks, marker, new_figure
from trainer.study.points import Points
from trainer.study.runs import Group, Study, best_by
from trainer.study.scaling_laws import (
    DataEfficiency,
    Fit,
    choose_law,
    data_efficiency,
    fit_law,
    rises,
)


def law_figures(study: Study) -> list[Drawing | Missing]:
    """All of them, in the order of the paper."""
    return [ensembles(study), parameters(study), repetition(study), efficiency(study)]


def law_text(fit: Fit) -> str:
    """A fit in one line: parameters with their intervals, residual, warnings."""
    values = ", ".join(
        f"{name} = {value:.4g} ({fit.interval(name)})"
        if len(fit.replicates)
        else f"{name} = {value:.4g}"
        for name, value in fit.parameters.items()
    )
    warned = "".join(f" Caution: {warning}." for warning in fit.warnings)
    return f"{fit.law.formula}: {values}; residual {fit.residual():.4f} nats.{warned}"


def draw_fit(axes: Any, fit: Fit, x: NDArray[np.float64], shade: str) -> None:
    """The fitted curve, its interval shaded, dashed where nothing was measured."""
    measured = fit.points.inputs[:, 0]
    inside = (x >= measured.min()) & (x <= measured.max())
    curve = fit.predict(x)
    axes.plot(x[inside], curve[inside], color=shade, linewidth=1)
    for part in (x <= measured.min(), x >= measured.max()):
        axes.plot(x[part], curve[part], color=shade, linewidth=1, linestyle="--")
    low, high = fit.predict_interval(x)
    if np.isfinite(low).all():
        axes.fill_between(x, low, high, color=shade, alpha=0.15, linewidth=0)


def ensembles(study: Study) -> Drawing | Missing:
    """Loss against the number of members with the fitted asymptote."""
    title = "Ensembles"
    scored = [ensemble for ensemble in study.ensembles if len(ensemble.losses) > 1]
    if not scored:
        return Missing(
            title,
            "no scored ensemble: evaluate.py runs=[A,B,...] output=<runs>/ensembles/NAME.json",
        )
    figure, axes = new_figure("members (K)", panels=2)
    rows, notes = [], []
    for ensemble in scored:
        members = np.arange(1.0, len(ensemble.losses) + 1)
        shade = colour(ensemble.name)
        label = f"{ensemble.name} ({ensemble.mean})"
        note = f"{label}: no asymptote, {len(members)} sizes are fewer than a law's 3 parameters."
        asymptote = math.nan
        if len(members) >= len(POWER.parameters):
            fit = fit_law(POWER, Points(members, [[loss] for loss in ensemble.losses]))
            asymptote = fit.parameters["C"]
            draw_fit(axes[0], fit, np.linspace(1, 2 * len(members), 60), shade)
            axes[0].axhline(asymptote, color=shade, linestyle=":", linewidth=1)
            label += f", K → ∞: {asymptote:.3f}"
            note = f"{ensemble.name}: {law_text(fit)}"
        notes.append(note)
        label = label.replace("$", r"\$")  # two of them would hold a formula
        axes[0].plot(members, ensemble.losses, "o", color=shade, label=label)
        rows += [
            {
                "ensemble": ensemble.name,
                "mean": ensemble.mean,
                "members": int(count),
                "loss": loss,
                "asymptote": asymptote,
            }
            for count, loss in zip(members, ensemble.losses, strict=True)
        ]
    for name, (losses, limit) in paper.ENSEMBLES.items():
        axes[1].plot(range(1, 6), losses, "o:", color=colour(name), label=f"{name}, ∞: {limit}")
        axes[1].axhline(limit, color=colour(name), linestyle=":", linewidth=1)
    for panel in axes:
        legend(panel)
    return Drawing("ensembles", title, figure, rows, notes)


def parameters(study: Study) -> Drawing | Missing:
    """Loss against model size, with the asymptote N -> infinity where three sizes were trained."""
    title = "Loss by parameters"
    _, mask, context, tokens = study.main_setting
    groups = [group for group in study.groups if group.first.setting[1:] == (mask, context, tokens)]
    lines: dict[tuple[str, int], dict[float, Group]] = defaultdict(dict)
    best = best_by(groups, lambda run: (run.kind, run.generations, run.result["parameters"]))
    for (kind, generations, size), group in best.items():
        lines[kind, generations][size] = group
    lines = {recipe: points for recipe, points in lines.items() if len(points) > 1}
    if not lines:
        return Missing(title, "no recipe was trained with two sizes of model")
    figure, (axes,) = new_figure("parameters (both embeddings included)")
    notes = [
        f"Published, real only: {paper.REAL_ONLY} at 300M, {paper.REAL_ONLY_ASYMPTOTE} for N → ∞."
    ]
    for points in lines.values():
        first = next(iter(points.values())).first
        shade, label = colour(first.kind), label_of(first)
        if len(points) >= len(POWER.parameters):
            sizes = np.array(list(points))
            fit = fit_law(POWER, Points(sizes, [group.losses() for group in points.values()]))
            draw_fit(axes, fit, np.geomspace(sizes.min(), 4 * sizes.max(), 60), shade)
            axes.axhline(fit.parameters["C"], color=shade, linestyle=":", linewidth=1)
            label += f", N → ∞: {fit.parameters['C']:.3f}"
            notes.append(f"{label_of(first)}: {law_text(fit)}")
        axes.errorbar(
            list(points),
            [group.mean() for group in points.values()],
            [group.spread() for group in points.values()],
            marker=marker(first.kind),
            linestyle="none",
            capsize=3,
            color=shade,
            label=label,
        )
    axes.set_xscale("log")
    legend(axes)
    rows = [row(group) for points in lines.values() for group in points.values()]
    return Drawing("loss-by-parameters", title, figure, rows, notes)


def repetition(study: Study) -> Drawing | Missing:
    """Laws of repeated data on the real-only runs, ordered by held-out error."""
    title = "Repeated data: which law foretells held-out runs"
    real = [
        group
        for group in study.groups
        if group.first.kind == "real" and group.first.setting[1:3] == study.main_setting[1:3]
    ]
    best = best_by(
        real, lambda run: (run.real_tokens, run.config.recipe.epochs, run.result["parameters"])
    )
    if len(best) < 4:
        return Missing(
            title,
            f"{len(best)} real-only combinations of tokens, epochs and model size, one left out, "
            "are fewer than a law's 3 parameters",
        )
    points = Points(np.array(list(best)), [group.losses() for group in best.values()])
    candidates = choose_law(REPEATED_DATA, points)
    fit = candidates[0].fit
    assert fit is not None
    figure, (axes,) = new_figure("epochs over the real stream (E)")
    curves: dict[tuple[float, float], list[tuple[float, Group]]] = defaultdict(list)
    for (tokens, epochs, size), group in best.items():
        curves[tokens, size].append((epochs, group))
    for place, ((tokens, size), line) in enumerate(curves.items()):
        shade = f"C{place % 10}"
        reach = [epochs for epochs, _ in line]
        x = np.geomspace(min(reach), max(reach), 50)
        inputs = np.stack([np.full_like(x, tokens), x, np.full_like(x, size)], axis=1)
        axes.plot(x, fit.predict(inputs), color=shade, linewidth=1)
        label = f"{tokens:,} tokens, {size:,} parameters"
        axes.plot(reach, [group.mean() for _, group in line], "o", color=shade, label=label)
    log_ticks(axes, [epochs for _, epochs, _ in best])
    legend(axes)
    notes = [law_text(fit)]
    rows = []
    for candidate in candidates:
        error = candidate.reason or f"held-out error {candidate.error:.2%}"
        notes.append(f"{candidate.law.name}: {error}")
        rows.append(
            {
                "law": candidate.law.name,
                "formula": candidate.law.formula,
                "held_out_error": candidate.error,
                "reason": candidate.reason,
            }
            | (candidate.fit.parameters if candidate.fit else {})
        )
    return Drawing("repeated-data", title, figure, rows, notes)


@dataclass(frozen=True)
class Answer:
    """The data efficiency of one recipe."""

    group: Group
    efficiency: DataEfficiency


def real_data_law(study: Study) -> Fit:
    """The power law over unique real tokens through the best real-only runs of the main setting.

    Model size, mask and context are those of the main setting: another mask or context changes
    which tokens are scored, and such losses are not comparable.

    Raises:
        ValueError: fewer than three sizes of corpus.
    """
    size, mask, context, _ = study.main_setting
    real = [
        group
        for group in study.groups
        if group.first.kind == "real" and group.first.setting[:3] == (size, mask, context)
    ]
    best = best_by(real, lambda run: run.real_tokens)
    if len(best) < len(POWER.parameters):
        sizes = f" ({', '.join(f'{tokens:,}' for tokens in best)} tokens)" if best else ""
        raise ValueError(
            f"the real-only law needs at least {len(POWER.parameters)} sizes of corpus at "
            f"{size:,} parameters, mask {mask} and context {context}, found {len(best)}"
            f"{sizes}; build corpora with other "
            "corpus.token_budget and the same documents, and train recipe=real on each"
        )
    points = Points(np.array(list(best)), [group.losses() for group in best.values()])
    if rises(points):
        losses = ", ".join(f"{group.mean():.4f} at {tokens:,}" for tokens, group in best.items())
        raise ValueError(
            f"the real-only losses rise with the data ({losses}): no law of data follows that; "
            "tune recipe=real at each size (sweep=star_real)"
        )
    return fit_law(POWER, points)


def answers(study: Study, law: Fit) -> list[Answer]:
    """Every synthetic recipe, best configuration, at its own real tokens."""
    synthetic = [
        group
        for group in study.groups
        if group.first.generations and group.first.setting[:3] == study.main_setting[:3]
    ]
    best = best_by(synthetic, lambda run: (run.kind, run.generations, run.real_tokens))
    return [
        Answer(group, data_efficiency(law, group.losses(), group.first.real_tokens))
        for group in best.values()
    ]


def efficiency_text(found: Sequence[Answer], law: Fit) -> str:
    """The answer to ``question=data_efficiency``."""
    if not found:
        raise ValueError("no run with a synthetic stream: train recipe=stitched or another")
    lines = []
    for answer in found:
        run, efficiency = answer.group.first, answer.efficiency
        interval = efficiency.interval
        reach = (
            "no interval"
            if math.isnan(interval.low)
            else f"95 % interval {times(interval.low)} to {times(interval.high)}"
        )
        lines.append(
            f"{run.kind} G={run.generations} is worth {times(efficiency.factor)} the data "
            f"({reach}), at {run.hours:.3g} {run.device}-hours and {run.generation_tokens:,} "
            f"generated tokens (loss {answer.group.mean():.4f}, {len(answer.group.runs)} seeds, "
            f"{run.real_tokens:,} real tokens)"
        )
        shown = [warning for warning in efficiency.warnings if warning not in law.warnings]
        lines += [f"  caution: {warning}" for warning in shown]
    lines.append(f"1.00 times is the {found[0].efficiency.reference.partition(' at ')[0]}")
    measured = law.points.inputs[:, 0]
    lines.append(
        f"  fitted to {len(measured)} sizes from {measured.min():,.0f} to {measured.max():,.0f} "
        f"real tokens, the best real-only configuration of each, residual {law.residual():.4f} nats"
    )
    lines += [f"  caution: {warning}" for warning in law.warnings]
    return "\n".join(lines)


def times(factor: float) -> str:
    return "more than any number of times" if math.isinf(factor) else f"{factor:.2f} times"


def efficiency(study: Study) -> Drawing | Missing:
    """The real-only data law, and how many times the data each recipe is worth."""
    title = "Data efficiency"
    try:
        law = real_data_law(study)
    except ValueError as error:
        return Missing(title, str(error))
    found = answers(study, law)
    figure, axes = new_figure("unique real tokens", panels=2)
    axes[0].set_title("real-only law", fontsize="medium")
    measured = law.points.inputs[:, 0]
    reach = [answer.efficiency.equivalent_tokens for answer in found]
    finite = [tokens for tokens in reach if math.isfinite(tokens)]
    farthest = min(max([measured.max(), *finite]), 10 * measured.max())
    x = np.geomspace(measured.min(), farthest, 80)
    draw_fit(axes[0], law, x, colour("real"))
    means = [float(np.mean(losses)) for losses in law.points.losses]
    axes[0].plot(measured, means, "o", color=colour("real"), label="real only")
    axes[0].set_xscale("log")
    lines: dict[tuple[str, int], list[Answer]] = defaultdict(list)
    for answer in found:
        run = answer.group.first
        lines[run.kind, run.real_tokens].append(answer)
        axes[0].axhline(answer.group.mean(), color=colour(run.kind), linewidth=0.8, alpha=0.6)
    axes[1].set_title("times the data", fontsize="medium")
    axes[1].set_xlabel("generations per document (G)")
    axes[1].set_ylabel("data efficiency")
    for (kind, tokens), line in lines.items():
        points = [answer for answer in line if math.isfinite(answer.efficiency.factor)]
        factors = np.array([answer.efficiency.factor for answer in points])
        ends = np.array(
            [(one.efficiency.interval.low, one.efficiency.interval.high) for one in points]
        ).reshape(-1, 2)
        bars = np.nan_to_num(np.abs(ends - factors[:, None]).T, nan=0.0, posinf=0.0)
        generations = [answer.group.first.generations for answer in points]
        axes[1].errorbar(
            generations,
            factors,
            bars,
            marker=marker(kind),
            capsize=3,
            color=colour(kind),
            label=kind if tokens == study.main_setting[3] else f"{kind}, {tokens:,} real tokens",
        )
    for name, factor in paper.HEADLINE.items():
        axes[1].axhline(factor, color="#bbbbbb", linestyle=":", label=f"published {name}, G=32")
    axes[1].axhline(1.0, color=colour("real"), linestyle="--")
    log_ticks(axes[1], [answer.group.first.generations for answer in found])
    for panel in axes:
        legend(panel)
    rows = [
        row(answer.group)
        | {
            "factor": answer.efficiency.factor,
            "low": answer.efficiency.interval.low,
            "high": answer.efficiency.interval.high,
            "equivalent_tokens": answer.efficiency.equivalent_tokens,
            "warnings": "; ".join(answer.efficiency.warnings),
        }
        for answer in found
    ]
    notes = [law_text(law)]
    if found:
        notes.append(efficiency_text(found, law))
    return Drawing("data-efficiency", title, figure, rows, notes)
