"""What ``evaluate.py`` does: scores printed, kept beside the run, and written where asked."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tabulate import tabulate

from trainer.config.evaluate import EvaluateConfig
from trainer.data.format import LOSS_COLUMNS
from trainer.evaluation.downstream import (
    SETS,
    TASKS,
    TRAINED,
    check_tasks,
    evaluate_tasks,
    keep_scores,
)
from trainer.evaluation.ensemble import check_members, describe_overlap, evaluate_ensemble
from trainer.evaluation.losses import Scores
from trainer.files import check_writable, replace_file, write_sealed
from trainer.run.export import export_run
from trainer.run.progress import newest_checkpoint, trained_now

logger = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig) -> float | None:
    """Score or export as asked; returns the i.i.d. loss in nats per token, None for an export.

    Raises:
        ValueError: options that do not fit together, or runs that do not fit one another.
    """
    config.check()
    if config.export:
        export_run(config.runs[0], config.export)
        logger.info(f"{config.runs[0]} written to {config.export}")
        return None
    for run in config.runs:
        checkpoint = newest_checkpoint(run)
        if checkpoint != Path(run) and not (Path(run) / "result.json").exists():
            logger.warning(
                f"{run} is not finished: this is its newest checkpoint, {checkpoint.name}"
            )
    check_early(config)
    found = evaluate_ensemble(config.runs, config.validation, config.mean)
    if config.document_losses:
        write_document_losses(found[-1], Path(config.document_losses))
    sizes = [one.to_dict() for one in found]
    scores = sizes[-1]
    show(sizes)
    scores["sets"] = score_sets(config)
    write_scores(config, scores, sizes)
    folder = Path(config.runs[0])
    # What a checkpoint or an ensemble scores is not what the report shows of a run.
    reported = len(config.runs) == 1 and (folder / "result.json").exists()
    if config.sets and reported:
        logger.info(f"written: {keep_scores(folder / SETS, scores['sets'])}")
    if config.tasks:
        scores["tasks"] = evaluate_tasks(
            config.runs[0], config.tasks, config.task_folder, config.task_limit
        )
        rows = [{"task": task, **metrics} for task, metrics in scores["tasks"].items()]
        print(tabulate(rows, "keys", "plain", floatfmt=".4g"))
        if reported:
            logger.info(f"written: {keep_scores(folder / TASKS, scores['tasks'])}")
        write_scores(config, scores, sizes)
    loss: float = scores["loss"]["iid"]
    return loss


def check_early(config: EvaluateConfig) -> None:
    """Raise ValueError or OSError for what would end the evaluation after its work is done."""
    for name in (config.validation, *config.sets):
        first = check_members(config.runs, name)
        cautions = [describe_overlap(run, first, name) for run in config.runs]
        for caution in filter(None, cautions):
            logger.warning(caution)
    if config.tasks:
        check_tasks(config.tasks, config.task_folder)
    for key, file in (("output", config.output), ("document_losses", config.document_losses)):
        if file is not None:
            if Path(file).is_dir():
                raise ValueError(f"{key}={file} is a folder; name a file in it")
            check_writable(Path(file).parent, f"{key}=... to a file in another folder")


def write_document_losses(scores: Scores, path: Path) -> None:
    """Id and nats per token of every document, as :data:`LOSS_COLUMNS`.

    A document of which nothing is predicted (one token, read alone) costs nothing: 0.
    """
    stream = scores.stream
    ids = [stream.document_of(index) for index in range(len(stream))]
    losses = scores.document_loss / np.maximum(1, scores.document_tokens)
    table = pa.table([pa.array(ids), pa.array(losses)], names=list(LOSS_COLUMNS))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as unfinished:
        pq.write_table(table, unfinished, compression="zstd", write_page_checksum=True)
    logger.info(f"written: {path}, the losses of {len(ids):,} documents")


def show(sizes: list[dict[str, Any]]) -> None:
    """Print the scores on the validation stream: of each size of an ensemble, then by part."""
    scores = sizes[-1]
    rows: list[tuple[str, float]] = []
    if len(sizes) > 1:
        rows = [(f"{count} members", size["loss"]["iid"]) for count, size in enumerate(sizes, 1)]
    rows += scores["loss"].items()
    rows += [(f"from position {start}", x) for start, x in scores["loss_by_position"].items()]
    by_member = scores.get("loss_by_kind", {}) | scores.get("loss_by_style", {})
    rows += [(f"{kind} members", loss) for kind, loss in by_member.items()]
    print(tabulate(rows, ["", "nats per token"], "plain", floatfmt=".4f"))
    print(f"{scores['bits_per_byte']:.4f} bits per byte")


def score_sets(config: EvaluateConfig) -> dict[str, Any]:
    """Scores on each further text set, printed as they come."""
    found = {}
    for name in config.sets:
        scores = evaluate_ensemble(config.runs, name, config.mean)[-1]
        found[name] = scores.to_dict()
        print(
            f"{name}: {scores.loss['iid']:.4f} nats per token, "
            f"{scores.bits_per_byte:.4f} bits per byte"
        )
    return found


def write_scores(
    config: EvaluateConfig, scores: dict[str, Any], sizes: list[dict[str, Any]]
) -> None:
    """Scores of the whole ensemble, and of its parts if there are several, to ``output``."""
    if config.output:
        trained = [trained_now(run) for run in config.runs]
        ensemble = {
            "members": config.runs,
            TRAINED: trained,
            "mean": config.mean.value,
            "sizes": sizes,
        }
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        write_sealed(Path(config.output), scores | (ensemble if len(sizes) > 1 else {}))
