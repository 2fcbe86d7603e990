"""Generations that could not be made: kept beside the store, counted by reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.files import optional, read_sealed, write_sealed

Key = tuple[str, int]  # document id and index
NOT_TRIED = "not tried"


@dataclass(frozen=True)
class Failure:
    """Why one generation is not there."""

    document_id: str
    index: int
    reason: str  # its kind, in a word or two
    problem: str  # what the server said


class Failures:
    """Those of one writer's job, in one file."""

    def __init__(self, folder: Path, writer: int) -> None:
        self.path = failures_path(folder, writer)
        self.found: list[Failure] = []
        self.saved = 0

    def add(self, document_id: str, index: int, reason: str, problem: str) -> None:
        self.found.append(Failure(document_id, index, reason, problem))

    def save(self) -> None:
        """Write the file where something was added since."""
        if len(self.found) > self.saved:
            write_sealed(self.path, {"failures": [asdict(failure) for failure in self.found]})
            self.saved = len(self.found)

    def describe(self) -> str:
        """How many generations of which documents failed and why, and what to do."""
        names = sorted({failure.document_id for failure in self.found})
        first = self.found[0]
        return (
            f"{len(self.found)} generations of {len(names)} documents failed "
            f"({', '.join(names[:5])}{', ...' if len(names) > 5 else ''}): "
            f"{describe_reasons(Counter(failure.reason for failure in self.found))}; the first, "
            f"{first.document_id}#{first.index}: {first.problem}. All of them: {self.path}. What "
            "succeeded is stored; the same command tries the rest again, and streams.missing=allow "
            "builds streams without them"
        )


def failures_path(folder: Path, writer: int) -> Path:
    return folder / f"failures-{writer:03d}.json"


def read_failures(path: Path) -> list[Failure]:
    """Those of one writer's latest job; none where all succeeded, or the file is damaged."""
    content = optional(path, read_sealed) or {}
    return [Failure(**entry) for entry in content.get("failures", [])]


def all_failures(folder: Path) -> dict[Key, Failure]:
    """What the latest jobs of a store could not make; some may have been made since."""
    return {
        (failure.document_id, failure.index): failure
        for path in sorted(folder.glob("failures-*.json"))
        for failure in read_failures(path)
    }


def reasons_of(missing: list[Key], failures: dict[Key, Failure]) -> dict[str, int]:
    """How many of the missing generations failed for which reason, most frequent first."""
    reasons = Counter(failures[key].reason if key in failures else NOT_TRIED for key in missing)
    return dict(reasons.most_common())


def describe_reasons(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
