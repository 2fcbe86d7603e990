"""Error on benchmarks by generations, from what ``evaluate.py tasks=[...]`` left with the runs."""

from __future__ import annotations

import math
import statistics
from typing import Any

from trainer.evaluation.downstream import CHANCE
from trainer.study.figures import describe_setting, row
from trainer.study.page import Drawing, Missing, colour, legend, log_ticks, marker, new_figure
from trainer.study.runs import Group, Run, Study, best_by


def benchmark_error(study: Study) -> Drawing | Missing:
    """Mean error over the tasks that all scored runs share, for the best group of each recipe.

    Raises:
        ValueError: two runs answered different numbers of questions of one task.
    """
    title = "Benchmark error by generations per document"
    scored = [group for group in study.main if any(run.tasks for run in group.runs)]
    if not scored:
        return Missing(
            title, "no run was scored on tasks: evaluate.py runs=[RUN] tasks=[arc_easy,piqa,sciq]"
        )
    groups = [Group([run for run in group.runs if run.tasks]) for group in scored]
    tasks = shared_tasks([run for group in groups for run in group.runs])
    if not tasks:
        return Missing(title, "the scored runs share no task with an accuracy")
    figure, (axes,) = new_figure("generations per document (G)", "error (1 - accuracy)")
    best = best_by(groups, lambda run: (run.kind, run.generations))
    for kind in dict.fromkeys(kind for kind, _ in best):
        points = {g: group for (name, g), group in best.items() if name == kind}
        errors = [mean_error(group, tasks) for group in points.values()]
        bars = [uncertainty(group, tasks) for group in points.values()]
        if 0 in points:
            axes.axhline(errors[0], color=colour(kind), linestyle="--", label=kind)
            continue
        style = {"marker": marker(kind), "color": colour(kind), "label": kind}
        axes.errorbar(list(points), errors, bars, capsize=3, **style)
    log_ticks(axes, [generations for _, generations in best if generations])
    legend(axes)
    notes = [
        f"Mean over {', '.join(tasks)}. Error bars: one standard deviation over seeds, or for one "
        "seed the standard error over the questions.",
        describe_setting(study),
    ]
    rows = [line(group, tasks) for group in best.values()]
    return Drawing("benchmark-error", title, figure, rows, notes)


def shared_tasks(runs: list[Run]) -> list[str]:
    """Tasks that every run was scored on, checked to be the same questions."""
    with_accuracy = [{task for task, found in run.tasks.items() if "acc" in found} for run in runs]
    tasks = sorted(set.intersection(*with_accuracy))
    first = runs[0]
    for run in runs:
        for task in tasks:
            ours, theirs = (one.tasks[task]["questions"] for one in (first, run))
            if ours != theirs:
                raise ValueError(
                    f"{run.path} answered {theirs:g} questions of {task}, {first.path} {ours:g}: "
                    "their errors cannot be compared; score them again with one task_limit"
                )
    return tasks


def error(run: Run, tasks: list[str]) -> float:
    return 1 - statistics.mean(run.tasks[task]["acc"] for task in tasks)


def mean_error(group: Group, tasks: list[str]) -> float:
    return statistics.mean(error(run, tasks) for run in group.runs)


def uncertainty(group: Group, tasks: list[str]) -> float:
    """Standard deviation over seeds; of one seed the standard error of the mean over tasks."""
    if len(group.runs) > 1:
        return statistics.stdev(error(run, tasks) for run in group.runs)
    standard_errors = (group.first.tasks[task].get("acc_stderr", math.nan) for task in tasks)
    return math.hypot(*standard_errors) / len(tasks)


def line(group: Group, tasks: list[str]) -> dict[str, Any]:
    """A group as a line of the CSV; errors of guessing are 1 in ``normalised_error``."""
    by_task = {
        task: statistics.mean(1 - run.tasks[task]["acc"] for run in group.runs) for task in tasks
    }
    known = set(tasks) <= CHANCE.keys()
    normalised = [by_task[task] / (1 - CHANCE[task]) for task in tasks] if known else [math.nan]
    return row(group) | {
        "error": mean_error(group, tasks),
        "uncertainty": uncertainty(group, tasks),
        "normalised_error": statistics.mean(normalised),
        **{f"error_{task}": value for task, value in by_task.items()},
    }
