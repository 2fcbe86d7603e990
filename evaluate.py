"""Score a run or an ensemble: ``python evaluate.py runs=[runs/a,runs/b]``.

``export=FOLDER`` writes a single run in Hugging Face's Llama format instead.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from trainer.ensemble import evaluate_runs
from trainer.errors import user_errors
from trainer.export import export_run


@dataclass
class EvaluateConfig:
    """What is evaluated."""

    runs: list[str] = field(default_factory=lambda: MISSING)  # several: mean of logits
    validation: str | None = None  # held-out stream; null: the one of the first run
    export: str | None = None  # write this run as a Hugging Face folder
    output: str | None = None  # also write the scores to this JSON file


ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
@user_errors
def main(config: DictConfig) -> float | None:
    """Return the i.i.d. loss."""
    options = OmegaConf.to_object(config)
    assert isinstance(options, EvaluateConfig)
    if options.export:
        if len(options.runs) != 1:
            raise ValueError(f"export needs exactly one run, not {len(options.runs)}")
        export_run(options.runs[0], Path(options.export))
        print(f"{options.runs[0]} written to {options.export}")
        return None
    scores = evaluate_runs(options.runs, options.validation).to_dict()
    for name, loss in scores["loss"].items():
        print(f"{name:>6} {loss:.4f} nats per token")
    print(f"{'':>6} {scores['bits_per_byte']:.4f} bits per byte")
    for position, loss in scores["loss_by_position"].items():
        print(f"from position {position:>7} {loss:.4f}")
    if options.output:
        Path(options.output).write_text(json.dumps(scores, indent=1))
    return scores["loss"]["iid"]


if __name__ == "__main__":
    main()
