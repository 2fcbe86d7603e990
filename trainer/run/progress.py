"""The checkpoints of a run and what each says of itself; needs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.files import DamagedFileError, read_sealed, sha256

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
    identity: str = ""  # of what is learnt; empty in those of older versions
    position: dict[str, Any] | None = None  # in the plan; None in those of older versions
    files: dict[str, str] = field(default_factory=dict)  # SHA-256 of the checkpoint's other files


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folder = run_dir / "checkpoints"
    return sorted(path for path in folder.glob("step-*") if STEP_FOLDER.fullmatch(path.name))


def read_progress(checkpoint: Path) -> Progress:
    """Progress stored in one checkpoint folder.

    Raises:
        DamagedFileError: the file is missing, damaged or of another version.
    """
    file = checkpoint / "progress.json"
    if not file.exists():
        raise DamagedFileError(f"{checkpoint} is no checkpoint: it holds no progress.json")
    content = read_sealed(file)
    try:
        return Progress(**content)
    except TypeError as error:
        raise DamagedFileError(f"{file} is damaged or of another version: {error}") from None


def damage_of(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint's files; None where they are what was written.

    Args:
        checkpoint: its folder.
        part: which share of the files to read, for ranks that divide them.
        parts: number of shares.
    """
    try:
        files = sorted(read_progress(checkpoint).files.items())
        for name, expected in files[part::parts]:
            if not (checkpoint / name).exists():
                return f"{name} is missing"
            if sha256(checkpoint / name) != expected:
                return f"{name} is not what was written"
    except (ValueError, OSError) as error:
        return str(error)
    return None


def what_is_trained(identity: str, step: int) -> str:
    """What scores say of the weights they belong to; empty where an older version trained them."""
    return f"{identity}@{step}" if identity else ""


def trained_now(run: str | Path) -> str:
    """:func:`what_is_trained` of the newest checkpoint of a run, or of a checkpoint."""
    progress = read_progress(newest_checkpoint(run))
    return what_is_trained(progress.identity, progress.step)


def require_whole(checkpoint: Path) -> None:
    """Raise DamagedFileError where a checkpoint is damaged; says how to go on."""
    if (problem := damage_of(checkpoint)) is not None:
        raise DamagedFileError(
            f"{checkpoint} is damaged ({problem}); delete it, and the run's result.json if there "
            "is one, and start train.py again: it goes on from the checkpoint before"
        )


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
