"""The checkpoints of a run and what each says of itself; needs no torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

STEP_FOLDER = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Progress:
    """What a checkpoint knows besides tensors."""

    step: int  # steps done
    plan_hash: str  # order of the data it was trained in
    tokenizer_sha256: str
    seconds: float  # training time so far, over all attempts
    usual_grad_norm: float = 0.0  # the step guard's memory
    accepted_steps: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0  # up to this step
    inputs: dict[str, str] = field(default_factory=dict)  # content hashes of what was read


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folder = run_dir / "checkpoints"
    return sorted(path for path in folder.glob("step-*") if STEP_FOLDER.fullmatch(path.name))


def read_progress(checkpoint: Path) -> Progress:
    """Progress stored in one checkpoint folder."""
    return Progress(**json.loads((checkpoint / "progress.json").read_text()))


def newest_checkpoint(path: str | Path) -> Path:
    """The newest checkpoint of a run folder, or the path itself if it is a checkpoint.

    Raises:
        FileNotFoundError: no complete checkpoint is there.
    """
    checkpoint = Path(path)
    if STEP_FOLDER.fullmatch(checkpoint.name):
        return checkpoint
    found = checkpoints(checkpoint)
    if not found:
        raise FileNotFoundError(
            f"{checkpoint} holds no finished checkpoint (looked for "
            f"{checkpoint}/checkpoints/step-*); train it with train.py first"
        )
    return found[-1]
