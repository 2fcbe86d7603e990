"""The commands of docs/clusters.md, word for word; words that make them small are appended."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import TINY, losses, result
from tests.cluster.slurm import Slurm
from tests.conftest import REPOSITORY, wait_until
from tests.conftest import TINY as TINY_CORPUS
from tests.test_docs import in_bash_blocks

EXAMPLES = list(in_bash_blocks(REPOSITORY / "docs" / "clusters.md"))
SMALL = [*TINY, "output=runs", "recipe.epochs=1", "checkpoint.count=1", "tracking.log_every=1"]


def example(*parts: str) -> list[str]:
    """The example that holds all these words."""
    (found,) = [words for words in map(shlex.split, EXAMPLES) if set(parts) <= set(words)]
    return found


@pytest.fixture
def clone(slurm: Slurm, streams: Path, tmp_path: Path) -> Path:
    """A folder with what a command needs of a clone, and data of its own."""
    for name in ("train.py", "generate.py", "conf"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").symlink_to(streams)
    return tmp_path


def run(slurm: Slurm, clone: Path, words: list[str]) -> str:
    done = subprocess.run(
        words, cwd=clone, env=slurm.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_sweep_by_submitit(slurm: Slurm, clone: Path) -> None:
    run(slurm, clone, [*example("launcher=slurm", "train.py"), *SMALL])
    assert len(losses(clone / "runs")) == 2


@pytest.mark.parametrize("script", ["train.sbatch", "torchrun.sbatch"])
def test_one_run_by_sbatch(script: str, slurm: Slurm, clone: Path) -> None:
    words = example(f"conf/train/launcher/{script}")
    said = run(slurm, clone, [words[0], "--wait", *words[1:], *SMALL, "name=one"])
    assert "Submitted batch job" in said
    assert result(clone / "runs" / "one")["processes"] == 4


@pytest.fixture
def ray_cluster(slurm: Slurm, tmp_path: Path) -> Iterator[None]:
    """A Ray of one node that runs already, with two pretended GPUs."""
    with subprocess.Popen(
        ["ray", "start", "--head", "--num-gpus=2", "--num-cpus=2", "--block", "--port=0"],
        env=slurm.environment,
        stdout=(tmp_path / "ray.log").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as head:
        wait_until(lambda: "Ray runtime started" in (tmp_path / "ray.log").read_text())
        yield
        family = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
        for process in family:
            process.kill()


@pytest.mark.usefixtures("ray_cluster")
def test_a_sweep_on_a_ray_that_runs_already(slurm: Slurm, clone: Path) -> None:
    run(slurm, clone, [*example("launcher=ray"), *SMALL])
    assert len(losses(clone / "runs")) == 2


def test_writers_of_which_one_loses_its_node(slurm: Slurm, clone: Path) -> None:
    (clone / "data" / "mine").unlink()
    small = [*TINY_CORPUS, "root=data/mine", "method.generations=4"]
    run(slurm, clone, [*example("task=corpus"), *small])
    sizes = ["hydra.launcher.gpus_per_node=1", "hydra.launcher.cpus_per_task=10"]  # a node each
    with subprocess.Popen(
        [*example("launcher=slurm", "generate.py"), *small, *sizes, "generator.flush_seconds=1"],
        cwd=clone,
        env=slurm.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as sweep:
        store = clone / "data" / "mine" / "generations" / "rephrase"
        wait_until(lambda: any(store.glob("*.parquet")))
        tasks = [one for one in psutil.process_iter() if node_of(one) == "node1"]
        assert tasks
        slurm.kill("slurmd-node1")
        # Those that would tell of the tasks' ends first: a node that is gone tells nothing.
        parents = {one.parent() for one in tasks}
        keepers = {one for one in parents if one and one.name() == "slurmstepd"}
        for process in (*keepers, *tasks):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        output, _ = sweep.communicate(timeout=240)
    assert sweep.returncode == 0, output
    slurm.start_node("node1")
    run(slurm, clone, [*example("task=streams"), *small])
    said = run(slurm, clone, ["python", "generate.py", "status", "root=data/mine"])
    assert "100.0% done" in said


def node_of(process: psutil.Process) -> str | None:
    """The node of Slurm that a process believes to be on."""
    try:
        name: str | None = process.environ().get("SLURMD_NODENAME")
    except psutil.Error:
        return None
    return name
