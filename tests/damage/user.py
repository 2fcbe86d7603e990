"""Who starts the study's command again and again, and reads what it says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.damage.small_study import as_a_user
from tests.warm import PROCESSES


@dataclass
class User:
    """Starts the study's command."""

    source: Path
    url: str
    said: Path

    def start(
        self, root: Path, seconds: float | None = None, file_limit: int | None = None
    ) -> int | None:
        """Exit status of the study; SIGKILL after some ``seconds``."""
        arguments = (self.source, root, self.url, self.said, file_limit)
        process = PROCESSES.Process(target=as_a_user, args=arguments)
        process.start()
        process.join(120 if seconds is None else seconds)
        if process.exitcode is None:
            assert seconds is not None, "the study hangs"
            process.kill()
            process.join()
        said = self.said.read_text()
        assert "Traceback" not in said, said[-2000:]
        return process.exitcode

    def error(self) -> str:
        """What ended the last start."""
        return self.said.read_text().partition("error: ")[2].strip()

    def warning(self) -> str:
        """What was left out of a report."""
        return self.said.read_text().partition("warning: ")[2].partition("\n")[0]


@dataclass
class Undisturbed:
    """A finished study to copy."""

    root: Path
    seconds: float  # that it took
    outcome: dict[str, object]
