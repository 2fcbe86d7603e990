"""The schema of ``evaluate.py``."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from trainer.config.fields import Place, check_bounds, required_list, setting


class Mean(enum.Enum):
    """What an ensemble averages."""

    logits = "logits"  # the paper's: a geometric mean of probabilities, normalised again
    probabilities = "probabilities"  # an arithmetic mean


@dataclass
class EvaluateConfig:
    """What is evaluated."""

    runs: list[str] = required_list("Run folders; several: an ensemble.", place=Place.here)
    mean: Mean = setting(Mean.logits, "What an ensemble averages: logits or probabilities.")
    validation: str | None = setting(
        None, "Held-out stream, by name or folder; null: the first run's.", place=Place.anywhere
    )
    sets: list[str] = setting(
        [], "More text sets: streams by name or folder.", place=Place.anywhere
    )
    tasks: list[str] = setting([], "Tasks of lm-eval, for a single run.")
    task_folder: str | None = setting(
        None, "Folder with lm-eval task files of your own.", place=Place.here
    )
    task_limit: int | None = setting(None, "Questions of each task; null: all.", at_least=1)
    export: str | None = setting(
        None,
        "Write this run as a Hugging Face folder (or to s3://..., gs://...) instead.",
        place=Place.anywhere,
    )
    output: str | None = setting(None, "Also write the scores to this JSON file.", place=Place.here)
    document_losses: str | None = setting(
        None,
        "Also write the loss of every document of validation to this Parquet file; of the stream "
        "real it is what generate.py method.losses= takes.",
        place=Place.here,
    )

    def check(self) -> None:
        """Raise ValueError where options do not fit together."""
        check_bounds(self)
        for name, asked in (("export", self.export), ("tasks", self.tasks)):
            if asked and len(self.runs) != 1:
                raise ValueError(f"{name} needs exactly one run, not {len(self.runs)}")
        others = ("sets", "tasks", "output", "document_losses", "validation")
        if self.export and (unused := [name for name in others if getattr(self, name)]):
            raise ValueError(
                f"export={self.export} writes the weights and scores nothing: leave out "
                f"{', '.join(unused)}, or ask for them in a call of their own"
            )
        if taken := {"iid", "short", "long"}.intersection(self.sets):
            raise ValueError(
                f"sets={sorted(taken)} are the report's names for parts of the validation stream; "
                "give the folder instead, such as sets=[data/mine/streams/long]"
            )
