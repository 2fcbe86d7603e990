"""Downstream tasks through lm-eval, in this process, on a run's Hugging Face export."""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.files import optional, read_sealed, write_sealed
from trainer.run.progress import what_is_trained

# In a run's folder, for the report.
TASKS = "tasks.json"
SETS = "sets.json"
TRAINED = "trained"  # key of what the scores of a file belong to

logger = logging.getLogger(__name__)

# Accuracy of guessing.
CHANCE = {
    "arc_easy": 0.25,
    "arc_challenge": 0.25,
    "hellaswag": 0.25,
    "piqa": 0.5,
    "sciq": 0.25,
    "winogrande": 0.5,
}


def check_tasks(tasks: Sequence[str], task_folder: str | None = None) -> Any:
    """lm-eval's manager of tasks, which knows all of ``tasks``.

    Raises:
        ValueError: lm-eval is not installed, or does not know a task.
    """
    try:
        manager = task_manager(task_folder)
    except ImportError as error:
        raise ValueError(
            f"tasks={list(tasks)} need the lm-eval package: pip install 'megadocs[eval]'"
        ) from error
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ValueError(
            f"lm-eval does not know the tasks {unknown}; `lm_eval ls tasks` lists its own, "
            "task_folder=... adds yours"
        )
    return manager


@functools.cache
def task_manager(task_folder: str | None) -> Any:
    """Knows lm-eval's tasks and those of a folder; to list them takes it five seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=task_folder)


def evaluate_tasks(
    run: str | Path, tasks: Sequence[str], task_folder: str | None = None, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Metrics of each task, such as ``{"sciq": {"acc": 0.71, "acc_stderr": 0.01, ...}}``.

    Args:
        run: run folder or checkpoint folder.
        tasks: lm-eval's names; the paper's are arc_easy, piqa and sciq.
        task_folder: folder with task files of your own, for machines without a network.
        limit: questions of each task; None for all.

    Raises:
        ValueError: lm-eval is not installed, does not know a task, or cannot get its data.
    """
    from trainer.parallel.ranks import choose_device  # torch, which a report need not import
    from trainer.run.export import export_run

    manager = check_tasks(tasks, task_folder)
    import lm_eval

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        export_run(run, model)
        try:
            found: Any = lm_eval.simple_evaluate(
                model="hf",
                model_args={"pretrained": str(model), "tokenizer": str(model)},
                tasks=list(tasks),
                task_manager=manager,
                device=str(choose_device("auto")),
                batch_size=16,
                limit=limit,
                bootstrap_iters=1000,
            )
        except (ConnectionError, FileNotFoundError) as error:
            raise ValueError(
                f"the data of tasks={list(tasks)} cannot be had here ({error}); put it into the "
                "datasets cache (HF_HOME) or use task_folder=... with local files"
            ) from error
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in metrics.items()
            if isinstance(value, float)
        }
        | {"questions": found["n-samples"][task]["effective"]}
        for task, metrics in found["results"].items()
        if task in found["n-samples"]  # a group's average has no questions of its own
    }


def keep_scores(path: Path, scores: dict[str, Any]) -> Path:
    """Keep scores in a finished run's folder, beside those of other names, for the report."""
    result = read_sealed(path.parent / "result.json")
    write_sealed(path, kept_scores(path, result) | scores | {TRAINED: trained_by(result)})
    return path


def kept_scores(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """What :func:`keep_scores` kept of the run with this result; nothing where that is damaged.

    A folder may hold another run than the one that was scored there, trained under its name.
    """
    scores = optional(path, read_sealed) or {}
    told = scores.pop(TRAINED, "")
    if told and told != trained_by(result):
        logger.warning(
            f"{path} holds scores of weights that were trained here before; they are left out: "
            "start evaluate.py again"
        )
        return {}
    return scores


def trained_by(result: dict[str, Any]) -> str:
    """What the run of a ``result.json`` has trained."""
    return what_is_trained(result.get("identity", ""), result["steps"])
