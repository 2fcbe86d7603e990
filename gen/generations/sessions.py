"""What every call of a generation job did, beside its store: progress, speed, cost."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trainer.files import optional, read_sealed, write_sealed


@dataclass
class Session:
    """One call of one writer; rewritten with every part, so a killed call leaves its last state."""

    writer: int
    writers: int
    expected: int  # generations this writer owes, those of earlier sessions included
    present: int  # of these, when the session began
    gpus: int
    began: float = field(default_factory=time.time)  # seconds since the epoch
    now: float = field(default_factory=time.time)
    host: str = field(default_factory=socket.gethostname)
    job: str = field(default_factory=lambda: os.environ.get("SLURM_JOB_ID", ""))
    ended: str = ""  # how the call ended; empty while it runs, and where it was killed
    generations: int = 0
    completion_tokens: int = 0
    prompt_tokens: int = 0  # of all requests, warm-ups included
    cached_tokens: int = 0  # of these, from the server's cache
    thinking_tokens: int = 0  # of the generated ones, before the text and not kept
    thoughts: int = 0  # answers that began with thinking
    requests: int = 0
    uncounted: int = 0  # of these, answered without counts of tokens
    retries: int = 0
    restarts: int = 0
    failed: int = 0

    @property
    def seconds(self) -> float:
        return max(1e-9, self.now - self.began)

    @property
    def cached_share(self) -> float:
        """Share of prompt tokens that the server had in its cache."""
        return self.cached_tokens / max(1, self.prompt_tokens)

    def save(self, store_folder: Path) -> None:
        """Write ``sessions/<began>-<writer>.json``."""
        self.now = time.time()
        folder = store_folder / "sessions"
        folder.mkdir(exist_ok=True)
        write_sealed(folder / f"{self.began:.3f}-{self.writer:03d}.json", asdict(self))


def read_sessions(store_folder: Path) -> list[Session]:
    """All sessions of a store, oldest first; a damaged one is said and left out."""
    paths = sorted((store_folder / "sessions").glob("*.json"))
    found = [content for path in paths if (content := optional(path, read_sealed)) is not None]
    return sorted((Session(**content) for content in found), key=lambda one: one.began)


def latest_of_writers(sessions: list[Session]) -> list[Session]:
    """The latest session of each writer of the present division of the work."""
    if not sessions:
        return []
    writers = sessions[-1].writers
    latest = {one.writer: one for one in sessions if one.writers == writers}
    return [latest[writer] for writer in sorted(latest)]
