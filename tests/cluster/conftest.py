"""One Slurm for all tests here, and a small corpus to train on."""

from __future__ import annotations

import contextlib
import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import tests.conftest
from tests.cluster.slurm import Slurm, Unavailable
from tests.conftest import REPOSITORY
from tests.trainer.conftest import write_stream

# Seconds until a job has begun or ended, on a machine that is busy with other work too.
PATIENCE = 300

# A run of seconds: a tiny model on 10 documents.
TINY = [
    "experiment=demo",
    "model=tiny",
    "data.context_length=64",
    "runtime.num_threads=1",
    "runtime.device=cpu",
    "tracking.tensorboard=false",
]


# Some seconds of training whose checkpoints lie far apart.
LONG = [*TINY, "checkpoint.count=1", "tracking.num_evaluations=1", "tracking.log_every=1"]


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with contextlib.ExitStack() as cleanup:
        try:
            yield cleanup.enter_context(Slurm(tmp_path_factory.mktemp("slurm")))
        except Unavailable as error:
            pytest.skip(f"no Slurm on this machine: {error}")


@dataclass
class Program:
    """One call of train.py or generate.py, as a user makes it in a folder of his."""

    script: str
    words: list[str]
    folder: Path
    environment: dict[str, str]
    before: list[str] = field(default_factory=list)  # such as srun and its options

    def __post_init__(self) -> None:
        self.log = self.folder / f"call-{time.monotonic_ns()}.log"
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [*self.before, sys.executable, str(REPOSITORY / self.script), *self.words],
                cwd=self.folder,
                env=self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def wait(self, status: int = 0, seconds: float = PATIENCE) -> str:
        """What it printed; it must end with this status."""
        try:
            found = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.text()}") from None
        assert found == status, f"status {found}:\n{self.text()}"
        return self.text()

    def text(self) -> str:
        return self.log.read_text()


def wait_until(condition: Callable[[], bool]) -> None:
    tests.conftest.wait_until(condition, PATIENCE)


Start = Callable[..., Program]


@pytest.fixture
def start(slurm: Slurm, tmp_path: Path) -> Iterator[Start]:
    """Start a program in a folder of its own, outside the checkout, with the Slurm at hand."""
    programs = []

    def starter(
        script: str, *words: str, before: Sequence[str] = (), folder: Path = tmp_path
    ) -> Program:
        programs.append(Program(script, list(words), folder, slurm.environment, list(before)))
        return programs[-1]

    yield starter
    for program in programs:
        program.process.kill()
    slurm.command("scancel", "--user=root", check=False)


@pytest.fixture(scope="session")
def streams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    write_stream(root / "streams" / "real", [[90 + 7 * index] for index in range(32)])
    write_stream(root / "streams" / "val", [[100]] * 4)
    return root


@pytest.fixture
def corpus(streams: Path, tmp_path: Path) -> str:
    """A corpus by a path relative to the folder that programs are started in."""
    (tmp_path / "data").symlink_to(streams)
    return "data"


def result(run: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((run / "result.json").read_text())
    return content


def starts(run: Path) -> list[int]:
    """Steps from which the jobs of a run began."""
    return [json.loads(line)["done"] for line in (run / "starts.jsonl").read_text().splitlines()]


def trains(run: Path) -> bool:
    log = run / "metrics.jsonl"
    return log.exists() and log.stat().st_size > 0


def losses(folder: Path) -> list[str]:
    """Column of the sweep's table."""
    return [row["loss_iid"] for row in csv.DictReader((folder / "results.csv").open())]
