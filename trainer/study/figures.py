"""The paper's figures that compare recipes, from whatever runs a study holds.

Every function returns a drawing, or what is missing for it. Published values stand in a panel of
their own: losses of another corpus and tokenizer share no axis with ours.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trainer.data.format import VARIANTS
from trainer.study import paper
from trainer.study.page import (
    Drawing,
    Missing,
    colour,
    legend,
    line_style,
    log_ticks,
    marker,
    new_figure,
)
from trainer.study.runs import Group, Run, Study, best_by

SET_NAMES = {"iid": "i.i.d. documents", "short": "short documents", "long": "long documents"}
ORDERS = [
    "-".join(filter(None, (kind, place)))
    for kind in ("simple", "stitched")
    for place in VARIANTS.values()
]
BARS = "The axis of the bars does not start at zero."


def recipe_figures(study: Study) -> list[Drawing | Missing]:
    """All of them, in the order of the paper."""
    sets = dict.fromkeys(name for run in study.runs for name in run.result["loss"])
    scored = {
        name: replace(study, runs=[run for run in study.runs if name in run.result["loss"]])
        for name in sets
    }
    return [
        *(by_generations(part, name) for name, part in scored.items()),
        fixed_hyper_parameters(study),
        by_axis(study, "epochs", "epochs over the real stream (E)"),
        by_axis(study, "mixing_fraction", "mixing fraction (w)"),
        order_bars(study),
        *by_style(study),
        mask_bars(study),
        no_separate_real(study),
        by_context(study),
        by_position(study),
        training(study),
    ]


def describe_setting(study: Study) -> str:
    """What the runs of the figures have in common, in words."""
    parameters, mask, context, tokens = study.main_setting
    return (
        f"{parameters:,} parameters, {tokens:,} real tokens, mask {mask}, context {context}; the "
        "best mean of the configurations with most seeds, error bars one standard deviation over "
        "the seeds"
    )


def row(group: Group, name: str = "iid") -> dict[str, Any]:
    """A group as a line of a CSV."""
    run, recipe = group.first, group.first.config.recipe
    return {
        "kind": run.kind,
        "generations": run.generations,
        "epochs": recipe.epochs,
        "mixing_fraction": recipe.mixing_fraction,
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "parameters": run.result["parameters"],
        "real_tokens": None if run.alone else run.real_tokens,
        "mask": run.config.data.mask.value,
        "context_length": run.config.data.context_length,
        "seeds": len(group.runs),
        "set": name,
        "loss": group.mean(name),
        "standard_deviation": group.spread(name),
    }


def draw_line(axes: Any, points: dict[float, Group], kind: str, name: str, label: str) -> None:
    """Mean losses by ``x``, the spread over the seeds as error bars."""
    axes.errorbar(
        list(points),
        [group.mean(name) for group in points.values()],
        [group.spread(name) for group in points.values()],
        marker=marker(kind),
        capsize=3,
        color=colour(kind),
        label=label,
    )


def lines_by_generations(groups: Sequence[Group], name: str) -> dict[str, dict[float, Group]]:
    """Kind -> G -> best group; real only is kind ``real`` at G = 0."""
    best = best_by(groups, lambda run: (run.kind, run.generations), name)
    lines: dict[str, dict[float, Group]] = defaultdict(dict)
    for (kind, generations), group in best.items():
        lines[kind][generations] = group
    return lines


def by_generations(study: Study, name: str) -> Drawing | Missing:
    """Loss on one evaluation set against G, a line a recipe."""
    title = f"Loss by generations per document: {SET_NAMES.get(name, name)}"
    lines = lines_by_generations(study.main, name)
    synthetic = {kind: points for kind, points in lines.items() if 0 not in points}
    if not synthetic:
        return Missing(title, "no run with a synthetic stream")
    published = paper.BY_GENERATIONS.get(name)
    figure, axes = new_figure("generations per document (G)", panels=2 if published else 1)
    for kind, points in lines.items():
        if 0 in points:
            label = "real only" if kind == "real" else kind
            axes[0].axhline(points[0].mean(name), color=colour(kind), linestyle="--", label=label)
        else:
            draw_line(axes[0], points, kind, name, kind)
    log_ticks(axes[0], [g for points in synthetic.values() for g in points])
    legend(axes[0])
    if published:
        for kind, losses in published.items():
            axes[1].plot(list(losses), list(losses.values()), "o:", color=colour(kind), label=kind)
        if name == "iid":
            axes[1].axhline(paper.REAL_ONLY, color=colour("real"), linestyle="--", label="real")
            axes[1].axhline(
                paper.REAL_ONLY_ASYMPTOTE, color="#bbbbbb", linestyle="--", label="real, N → ∞"
            )
        log_ticks(axes[1], [g for losses in published.values() for g in losses])
        legend(axes[1])
    rows = [row(group, name) for points in lines.values() for group in points.values()]
    file = f"loss-by-generations-{name.replace('/', '-')}"
    return Drawing(file, title, figure, rows, [describe_setting(study)])


def fixed_hyper_parameters(study: Study) -> Drawing | Missing:
    """Loss against G with every recipe at the optimum of simple for the same G."""
    title = "Loss by generations, all recipes at the optimum of simple rephrasing"

    def setup(run: Run) -> tuple[float, ...]:
        recipe = run.config.recipe
        return (
            recipe.epochs,
            recipe.mixing_fraction,
            recipe.learning_rate,
            recipe.weight_decay,
        )

    simple = best_by(
        [group for group in study.main if group.first.kind == "simple"], lambda run: run.generations
    )
    lines: dict[str, dict[float, Group]] = defaultdict(dict)
    for group in study.main:
        run = group.first
        reference = simple.get(run.generations)
        if reference and setup(run) == setup(reference.first):
            lines[run.kind][run.generations] = group
    if len(lines) < 2:
        return Missing(title, "no other recipe was trained with the hyper-parameters of simple")
    figure, (axes,) = new_figure("generations per document (G)")
    for kind, points in sorted(lines.items()):
        draw_line(axes, dict(sorted(points.items())), kind, "iid", kind)
    log_ticks(axes, list(simple))
    legend(axes)
    rows = [row(group) for points in lines.values() for group in points.values()]
    return Drawing("loss-fixed-hyper-parameters", title, figure, rows, [describe_setting(study)])


def by_axis(study: Study, axis: str, label: str) -> Drawing | Missing:
    """Best loss at each value of one hyper-parameter, all runs faint behind it."""
    title = f"Best loss by {label}"
    recipes: dict[tuple[str, int], list[Group]] = defaultdict(list)
    for group in study.main:
        recipes[group.first.kind, group.first.generations].append(group)
    lines = {
        recipe: best_by(groups, lambda run: getattr(run.config.recipe, axis))
        for recipe, groups in sorted(recipes.items())
    }
    lines = {recipe: points for recipe, points in lines.items() if len(points) > 1}
    if not lines:
        return Missing(title, f"no recipe was trained with two values of recipe.{axis}")
    published = paper.BY_EPOCHS if axis == "epochs" else {}
    figure, axes = new_figure(label, panels=2 if published else 1)
    for (kind, generations), points in lines.items():
        for group in recipes[kind, generations]:
            value = getattr(group.first.config.recipe, axis)
            axes[0].plot(value, group.mean(), ".", color=colour(kind), alpha=0.3)
        axes[0].plot(
            list(points),
            [group.mean() for group in points.values()],
            marker="o",
            linestyle=line_style(kind, generations),
            color=colour(kind),
            label=f"{kind} G={generations}" if generations else kind,
        )
    if axis == "epochs":
        log_ticks(axes[0], [value for points in lines.values() for value in points])
    for (kind, generations), losses in published.items():
        axes[1].plot(
            list(losses),
            list(losses.values()),
            marker="o",
            linestyle=line_style(kind, generations),
            color=colour(kind),
            label=f"{kind} G={generations}",
        )
    if published:
        log_ticks(axes[1], [value for losses in published.values() for value in losses])
        legend(axes[1])
    legend(axes[0])
    rows = [row(group) for recipe in lines for group in recipes[recipe]]
    name = f"loss-by-{axis.replace('_', '-')}"
    return Drawing(name, title, figure, rows, [describe_setting(study)])


def bars(axes: Any, groups: dict[str, Group]) -> None:
    """Means with error bars; the axis starts below the smallest, not at zero."""
    means = [group.mean() for group in groups.values()]
    spread = [group.spread() for group in groups.values()]
    colours = [colour(group.first.kind) for group in groups.values()]
    axes.bar(list(groups), means, yerr=spread, capsize=4, color=colours)
    zoom(axes, means, max(spread))


def published_bars(axes: Any, losses: dict[str, float], kinds: Sequence[str]) -> None:
    axes.bar(list(losses), list(losses.values()), color=[colour(kind) for kind in kinds], alpha=0.6)
    zoom(axes, list(losses.values()), 0.0)


def zoom(axes: Any, means: Sequence[float], spread: float) -> None:
    room = max(max(means) - min(means), spread, 1e-3)
    axes.set_ylim(min(means) - room - spread, max(means) + 0.5 * room + spread)
    axes.tick_params(axis="x", rotation=20, labelsize="small")


def order_bars(study: Study) -> Drawing | Missing:
    """Simple against stitched with the real document last, first or absent, at one G."""
    title = "Order of the members and place of the real document"
    by_g: dict[int, dict[str, Group]] = defaultdict(dict)
    best = best_by(study.main, lambda run: (run.generations, run.kind))
    for (generations, kind), group in best.items():
        if generations and kind in ORDERS:
            by_g[generations][kind] = group
    generations, groups = max(by_g.items(), key=lambda pair: len(pair[1]), default=(0, {}))
    if len(groups) < 2:
        return Missing(title, "no two orders (simple, stitched, their variants) at one G")
    published = paper.ORDER.get(generations, paper.ORDER[8])
    figure, axes = new_figure("", panels=2)
    bars(axes[0], groups)
    axes[0].set_title(f"these runs, G = {generations}", fontsize="medium")
    published_bars(axes[1], published, list(published))
    shown = generations if generations in paper.ORDER else 8
    axes[1].set_title(f"published, 300M, G = {shown}", fontsize="medium")
    rows = [row(group) for group in groups.values()]
    return Drawing("order", title, figure, rows, [BARS, describe_setting(study)])


def by_style(study: Study) -> list[Drawing | Missing]:
    """Loss against generated tokens, several styles in one stream beside one; where there are any.

    In its numbers every group of several styles stands beside the group of one style, of the same
    kind of stream, that has most nearly as many generated tokens.
    """
    title = "Several styles in one stream, against generated tokens"
    kinds = ("simple", "stitched")
    groups = [one for one in study.main if one.first.kind.split("-")[0] in kinds]
    best = best_by(groups, lambda run: (run.kind, run.generations))
    several = [group for group in best.values() if "+" in group.first.kind]
    if not several:  # the paper has none
        return []
    lines: dict[str, dict[float, Group]] = defaultdict(dict)
    for group in best.values():
        lines[group.first.kind][group.first.generation_tokens] = group
    figure, (axes,) = new_figure("generated tokens in the stream")
    for kind, points in lines.items():
        ordered = dict(sorted(points.items()))
        axes.errorbar(
            list(ordered),
            [group.mean() for group in ordered.values()],
            [group.spread() for group in ordered.values()],
            marker="D" if "+" in kind else marker(kind),
            capsize=3,
            label=kind,
        )
    legend(axes)
    rows = []
    for group in best.values():
        values = row(group) | {"generated_tokens": group.first.generation_tokens}
        if group in several:
            values |= nearest_single(group, [one for one in best.values() if one not in several])
        rows.append(values)
    return [Drawing("loss-by-style", title, figure, rows, [describe_setting(study)])]


def nearest_single(group: Group, singles: Sequence[Group]) -> dict[str, Any]:
    """The group of one style that is most nearly of a group's generated tokens, and by how much."""
    kind, tokens = group.first.kind.split("-")[0], group.first.generation_tokens
    alike = [one for one in singles if one.first.kind.split("-")[0] == kind]
    if not alike:
        return {}
    nearest = min(alike, key=lambda one: abs(math.log(one.first.generation_tokens / tokens)))
    return {
        "one_style": nearest.first.kind,
        "its_generations": nearest.first.generations,
        "its_generated_tokens": nearest.first.generation_tokens,
        "loss_minus_its": group.mean() - nearest.mean(),
    }


def mask_bars(study: Study) -> Drawing | Missing:
    """The same recipe under different masks."""
    title = "Attention masks"
    parameters, _, context, tokens = study.main_setting
    masks: dict[tuple[str, int], dict[str, Group]] = defaultdict(dict)
    comparable = [
        group
        for group in study.groups
        if (group.first.setting[0], *group.first.setting[2:]) == (parameters, context, tokens)
    ]
    best = best_by(comparable, lambda run: (run.kind, run.generations, run.config.data.mask.value))
    for (kind, generations, mask), group in best.items():
        masks[kind, generations][mask] = group
    masks = {recipe: groups for recipe, groups in masks.items() if len(groups) > 1}
    if not masks:
        return Missing(title, "no recipe was trained under two masks")
    figure, axes = new_figure("", panels=2)
    flat = {
        f"{kind} G={generations}\n{mask}" if generations else f"{kind}\n{mask}": group
        for (kind, generations), groups in masks.items()
        for mask, group in groups.items()
    }
    bars(axes[0], flat)
    published = {
        f"{kind} G={generations}\n{mask}" if generations else f"{kind}\n{mask}": loss
        for (kind, generations), losses in paper.MASKS.items()
        for mask, loss in losses.items()
    }
    published_bars(axes[1], published, list(published))
    note = (
        "With mask none the evaluation reads across documents as well, and scores each document's "
        "first token; under the other masks it does not."
    )
    rows = [row(group) for group in flat.values()]
    return Drawing("masks", title, figure, rows, [BARS, note, describe_setting(study)])


def no_separate_real(study: Study) -> Drawing | Missing:
    """A megadoc stream read alone against the same stream beside the real one."""
    title = "Without a separate real stream"
    pairs: dict[str, Group] = {}
    for group in best_by(
        [
            group
            for group in study.groups
            if group.first.alone and group.first.setting[:3] == study.main_setting[:3]
        ],
        lambda run: run.kind,
    ).values():
        stream = group.first.config.recipe.real_stream
        mixed = best_by(
            [
                other
                for other in study.main
                if other.first.config.recipe.synthetic == stream
                and same_input(other.first, group.first, stream)
            ],
            lambda run: run.kind,
        )
        if mixed:
            pairs[f"{stream}\nwith the real stream"] = next(iter(mixed.values()))
            pairs[f"{stream}\nalone"] = group
    if not pairs:
        return Missing(title, "no stream was trained both alone (recipe.real_stream) and mixed")
    figure, axes = new_figure("", panels=2)
    bars(axes[0], pairs)
    published_bars(axes[1], paper.NO_SEPARATE_REAL, ["stitched"] * 2)
    rows = [row(group) for group in pairs.values()]
    return Drawing("no-separate-real", title, figure, rows, [BARS, describe_setting(study)])


def same_input(one: Run, other: Run, stream: str) -> bool:
    """Whether two runs read the same content under a stream's name."""
    return one.inputs.get(stream, one.config.data.root) == other.inputs.get(
        stream, other.config.data.root
    )


def by_context(study: Study) -> Drawing | Missing:
    """Loss against the context length of training and evaluation."""
    title = "Loss by context length"
    parameters, mask, _, tokens = study.main_setting
    lines: dict[tuple[str, int], dict[float, Group]] = defaultdict(dict)
    best = best_by(
        [
            group
            for group in study.groups
            if (*group.first.setting[:2], group.first.setting[3]) == (parameters, mask, tokens)
        ],
        lambda run: (run.kind, run.generations, run.config.data.context_length),
    )
    for (kind, generations, context), group in best.items():
        lines[kind, generations][context] = group
    lines = {recipe: points for recipe, points in lines.items() if len(points) > 1}
    if not lines:
        return Missing(title, "no recipe was trained with two values of data.context_length")
    figure, axes = new_figure("context length (tokens)", panels=2)
    for (kind, generations), points in lines.items():
        label = f"{kind} G={generations}" if generations else kind
        draw_line(axes[0], points, kind, "iid", label)
    log_ticks(axes[0], [context for points in lines.values() for context in points])
    for kind, losses in paper.BY_CONTEXT.items():
        axes[1].plot(list(losses), list(losses.values()), "o:", color=colour(kind), label=kind)
    log_ticks(axes[1], list(paper.BY_CONTEXT["latent"]))
    for panel in axes:
        legend(panel)
    rows = [row(group) for points in lines.values() for group in points.values()]
    return Drawing("loss-by-context", title, figure, rows, ["Published: G = 16, read by eye."])


def by_position(study: Study) -> Drawing | Missing:
    """Loss against the position in the held-out document, the best run of each recipe."""
    title = "Loss by position in the document"
    figure, (axes,) = new_figure("position in the document (tokens)", "loss (nats per token)")
    rows = []
    best = best_by(study.main, lambda run: (run.kind != "real", run.kind, run.generations))
    for group in best.values():
        run = group.first
        positions = [int(place) for place in run.result["loss_by_position"] if int(place) > 0]
        losses = [
            sum(one.result["loss_by_position"][str(place)] for one in group.runs) / len(group.runs)
            for place in positions
        ]
        if not positions:
            return Missing(title, f"{run.path} has no loss by position")
        style = line_style(run.kind, run.generations)
        shade = colour(run.kind)
        axes.plot(positions, losses, ".", linestyle=style, color=shade, label=label_of(run))
        rows += [
            {**row(group), "position": place, "loss": loss}
            for place, loss in zip(positions, losses, strict=True)
        ]
    axes.set_xscale("log", base=2)
    legend(axes)
    note = "Positions are powers of two and hold everything up to the next; mean over the seeds."
    return Drawing("loss-by-position", title, figure, rows, [note, describe_setting(study)])


def training(study: Study) -> Drawing | Missing:
    """Training and validation loss over the best run of each recipe."""
    title = "Training loss"
    figure, (axes,) = new_figure("share of the run", "loss (nats per token)")
    rows = []
    for group in best_by(study.main, lambda run: (run.kind, run.generations)).values():
        run = group.first
        for key, style in (("train/loss", "-"), ("eval/iid", ":")):
            points = [(line["step"], line[key]) for line in run.metrics if key in line]
            shares = [step / run.result["steps"] for step, _ in points]
            label = label_of(run) if key == "train/loss" and points else None
            losses = [loss for _, loss in points]
            axes.plot(shares, losses, style, color=colour(run.kind), label=label)
            rows += [
                {"run": run.path.name, "metric": key, "step": step, "loss": loss}
                for step, loss in points
            ]
    if not rows:
        return Missing(title, "the runs hold no metrics.jsonl")
    axes.plot([], [], ":", color="black", label="validation")
    legend(axes)
    return Drawing("training", title, figure, rows, [describe_setting(study)])


def label_of(run: Run) -> str:
    return f"{run.kind} G={run.generations}" if run.generations else run.kind
