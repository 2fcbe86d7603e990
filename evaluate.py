"""Score a run or an ensemble: ``python evaluate.py runs=[runs/a,runs/b]``.

An ensemble of all sizes up to K, for the report's figure over K:
``python evaluate.py runs=[...] output=runs/ensembles/stitched.json``.
More text sets: ``sets=[arxiv_cs,data/other/streams/val]``; tasks: ``tasks=[arc_easy,piqa,sciq]``.
Of a single run both are kept in its folder, and the report draws them.
``export=FOLDER`` writes a single run in Hugging Face's Llama format instead.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from trainer.errors import user_errors
from trainer.evaluation.downstream import SETS, TASKS, evaluate_tasks, keep_scores
from trainer.evaluation.ensemble import Mean, evaluate_ensemble
from trainer.run.checkpoint import newest_checkpoint
from trainer.run.export import export_run
from trainer.run.run_dir import write_json


@dataclass
class EvaluateConfig:
    """What is evaluated."""

    runs: list[str] = field(default_factory=lambda: MISSING)  # several: an ensemble
    mean: Mean = Mean.logits  # of what: logits or probabilities
    validation: str | None = None  # held-out stream, by name or folder; null: the first run's
    sets: list[str] = field(default_factory=list)  # more text sets: streams by name or folder
    tasks: list[str] = field(default_factory=list)  # lm-eval's, for a single run
    task_folder: str | None = None  # lm-eval task files of your own
    task_limit: int | None = None  # questions of each task; null: all
    export: str | None = None  # write this run as a Hugging Face folder
    output: str | None = None  # also write the scores to this JSON file


ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
@user_errors
def main(config: DictConfig) -> float | None:
    """Return the i.i.d. loss."""
    options = OmegaConf.to_object(config)
    assert isinstance(options, EvaluateConfig)
    for name, asked in (("export", options.export), ("tasks", options.tasks)):
        if asked and len(options.runs) != 1:
            raise ValueError(f"{name} needs exactly one run, not {len(options.runs)}")
    if taken := {"iid", "short", "long"}.intersection(options.sets):
        raise ValueError(
            f"sets={sorted(taken)} are the report's names for parts of the validation stream; "
            "give the folder instead, such as sets=[data/mine/streams/long]"
        )
    if options.export:
        export_run(options.runs[0], Path(options.export))
        print(f"{options.runs[0]} written to {options.export}")
        return None
    for run in options.runs:
        checkpoint = newest_checkpoint(run)
        if checkpoint != Path(run) and not (Path(run) / "result.json").exists():
            print(f"{run} is not finished: this is its newest checkpoint, {checkpoint.name}")
    sizes = [
        scores.to_dict()
        for scores in evaluate_ensemble(options.runs, options.validation, options.mean)
    ]
    scores = sizes[-1]
    if len(sizes) > 1:
        for count, size in enumerate(sizes, 1):
            print(f"{count:>6} members: {size['loss']['iid']:.4f} nats per token")
    for name, loss in scores["loss"].items():
        print(f"{name:>6} {loss:.4f} nats per token")
    print(f"{'':>6} {scores['bits_per_byte']:.4f} bits per byte")
    for position, loss in scores["loss_by_position"].items():
        print(f"from position {position:>7} {loss:.4f}")
    for kind, loss in scores.get("loss_by_kind", {}).items():
        print(f"{kind:>8} members {loss:.4f} nats per token")
    scores["sets"] = {}
    for name in options.sets:
        found = evaluate_ensemble(options.runs, name, options.mean)[-1]
        scores["sets"][name] = found.to_dict()
        loss, bits = found.loss["iid"], found.bits_per_byte
        print(f"{name}: {loss:.4f} nats per token, {bits:.4f} bits per byte")
    write_scores(options, scores, sizes)
    folder = Path(options.runs[0])
    # What a checkpoint or an ensemble scores is not what the report shows of a run.
    reported = len(options.runs) == 1 and (folder / "result.json").exists()
    if options.sets and reported:
        print(f"written: {keep_scores(folder / SETS, scores['sets'])}")
    if options.tasks:
        scores["tasks"] = evaluate_tasks(
            options.runs[0], options.tasks, options.task_folder, options.task_limit
        )
        for task, metrics in scores["tasks"].items():
            print(f"{task}: " + ", ".join(f"{name} {x:.4g}" for name, x in metrics.items()))
        if reported:
            print(f"written: {keep_scores(folder / TASKS, scores['tasks'])}")
        write_scores(options, scores, sizes)
    return scores["loss"]["iid"]


def write_scores(
    options: EvaluateConfig, scores: dict[str, Any], sizes: list[dict[str, Any]]
) -> None:
    """Scores of the whole ensemble, and of its parts if there are several, to ``output``."""
    if options.output:
        ensemble = {"members": options.runs, "mean": options.mean.value, "sizes": sizes}
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(options.output), scores | (ensemble if len(sizes) > 1 else {}))


if __name__ == "__main__":
    main()
