"""The commands of docs/clusters.md, word for word; words that make them small are appended."""

from __future__ import annotations

import contextlib
import http.server
import re
import shlex
import shutil
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from gen.generations.sessions import read_sessions
from gen.serving.servers import GeneratorConfig, embedded_server
from tests.cluster.conftest import PATIENCE, TINY, losses, result, wait_until
from tests.cluster.slurm import Slurm
from tests.conftest import REPOSITORY
from tests.conftest import TINY as TINY_CORPUS
from tests.test_docs import in_bash_blocks
from trainer.files import read_sealed

pytestmark = pytest.mark.timeout(2 * PATIENCE)

EXAMPLES = [shlex.split(words) for words in in_bash_blocks(REPOSITORY / "docs" / "clusters.md")]
# Words that find each of them.
FIND = {
    "sweep": {"train.py", "launcher=slurm"},
    "evaluation": {"evaluate.py", "launcher=slurm"},
    "train.sbatch": {"conf/train/launcher/train.sbatch"},
    "torchrun.sbatch": {"conf/train/launcher/torchrun.sbatch"},
    "sweep by ray": {"train.py", "launcher=ray"},
    "evaluation by ray": {"evaluate.py", "launcher=ray"},
    "corpus": {"generate.py", "task=corpus"},
    "writers": {"generate.py", "launcher=slurm", "task=generate"},
    "writers by ray": {"generate.py", "launcher=ray"},
    "streams": {"generate.py", "task=streams"},
    "servers": {"generate.py", "generator=openai"},
}
SMALL = [*TINY, "output=runs", "recipe.epochs=1", "checkpoint.count=1", "tracking.log_every=1"]


def example(name: str) -> list[str]:
    """The example of this name in :data:`FIND`."""
    (found,) = [words for words in EXAMPLES if FIND[name] <= set(words)]
    return found


def test_every_example_is_one_of_these() -> None:
    assert sorted(map(example, FIND)) == sorted(EXAMPLES)


@pytest.fixture
def clone(slurm: Slurm, streams: Path, tmp_path: Path) -> Path:
    """A folder with what a command needs of a clone, and data of its own."""
    for name in ("train.py", "generate.py", "evaluate.py", "conf"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").symlink_to(streams)
    return tmp_path


def run(
    slurm: Slurm, clone: Path, words: list[str], environment: Mapping[str, str] | None = None
) -> str:
    """What a command prints that a user types in the clone; it must end well."""
    done = subprocess.run(
        words,
        cwd=clone,
        env={**slurm.environment, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_evaluation(clone: Path, said: str) -> None:
    """Of two runs, each by a job of its own."""
    for seed in range(2):
        assert set(read_sealed(clone / "runs" / f"seed-{seed}" / "sets.json")) == {"trained", "val"}
        assert re.search(rf"done   runs=\[runs/seed-{seed}\]: \d\.\d+", said)


def test_a_sweep_by_submitit_and_its_evaluation(slurm: Slurm, clone: Path) -> None:
    run(slurm, clone, [*example("sweep"), *SMALL, "name=seed-${seed}"])
    assert len(losses(clone / "runs")) == 2
    check_evaluation(clone, run(slurm, clone, example("evaluation")))


@pytest.mark.parametrize("script", ["train.sbatch", "torchrun.sbatch"])
def test_one_run_by_sbatch(script: str, slurm: Slurm, clone: Path) -> None:
    words = example(script)
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
def test_a_sweep_on_a_ray_that_runs_already_and_its_evaluation(slurm: Slurm, clone: Path) -> None:
    run(slurm, clone, [*example("sweep by ray"), *SMALL])
    assert len(losses(clone / "runs")) == 2
    check_evaluation(clone, run(slurm, clone, example("evaluation by ray")))


@pytest.fixture
def new_corpus(slurm: Slurm, clone: Path) -> list[str]:
    """Words for a small corpus in data/mine, which is there without its generations."""
    (clone / "data" / "mine").unlink()
    small = [*TINY_CORPUS, "root=data/mine", "method.generations=4"]
    run(slurm, clone, [*example("corpus"), *small])
    return small


def status(slurm: Slurm, clone: Path) -> str:
    return run(slurm, clone, ["python", "generate.py", "status", "root=data/mine"])


def test_writers_of_which_one_loses_its_node_and_one_is_told_to_stop(
    slurm: Slurm, clone: Path, new_corpus: list[str]
) -> None:
    sizes = ["hydra.launcher.gpus_per_node=1", "hydra.launcher.cpus_per_task=10"]  # a node each
    new_corpus = [*new_corpus, "method.generations=24"]  # so many that both are met at work
    store = clone / "data" / "mine" / "generations" / "rephrase"
    with subprocess.Popen(
        [*example("writers"), *new_corpus, *sizes, "generator.flush_seconds=1"],
        cwd=clone,
        env=slurm.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as sweep:
        wait_until(lambda: all(any(store.glob(f"part-00{one}-*")) for one in range(2)))
        told = status(slurm, clone)
        for writer in range(2):
            assert re.search(rf"generate-rephrase-{writer}-of-2: running as job \d+_\d", told)
        assert "writer 0 of 2 is running on " in told
        lost, stopped = sorted(name for name, state in slurm.jobs().items() if state == "RUNNING")
        slurm.command("scancel", "--signal=USR2", stopped)  # what submitit's time limit sends
        (node,) = {node_of(one, lost) for one in psutil.process_iter()} - {None}
        tasks = [one for one in psutil.process_iter() if node_of(one, lost)]
        slurm.kill(f"slurmd-{node}")
        # Those that would tell of the tasks' ends first: a node that is gone tells nothing.
        parents = {one.parent() for one in tasks}
        keepers = {one for one in parents if one and one.name() == "slurmstepd"}
        for process in (*keepers, *tasks):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        output, _ = sweep.communicate(timeout=PATIENCE)
    assert sweep.returncode == 0, output
    slurm.start_node(str(node))
    ends = [session.ended for session in read_sessions(store)]
    assert sorted(ends) == ["", "ended", "ended", "stopped by SIGUSR2"]
    told = status(slurm, clone)
    assert "100.0% done" in told
    assert "job" not in told


def test_streams_by_several_writers_are_those_of_one(
    slurm: Slurm, clone: Path, new_corpus: list[str]
) -> None:
    new_corpus = [*new_corpus, "method.generations=1"]
    run(slurm, clone, ["python", "generate.py", *new_corpus, "task=generate"])
    mine, alone = clone / "data" / "mine", clone / "data" / "alone"
    shutil.copytree(mine, alone, ignore=shutil.ignore_patterns("streams", "tokens", "*.lock"))
    said = run(slurm, clone, [*example("streams"), *new_corpus, "hydra.launcher.cpus_per_task=4"])
    assert said.count("done   streams.writer=") == 4
    run(slurm, clone, ["python", "generate.py", *new_corpus, "root=data/alone", "task=streams"])
    for stream in ("real", "val", "simple-g1", "stitched-g1"):
        assert contents(mine / "streams" / stream) == contents(alone / "streams" / stream)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("ray_cluster")
def test_writers_on_a_ray_that_runs_already(
    slurm: Slurm, clone: Path, new_corpus: list[str]
) -> None:
    run(slurm, clone, [*example("writers by ray"), *new_corpus, "method.generations=1"])
    assert "100.0% done" in status(slurm, clone)


def test_several_servers_for_one_client(slurm: Slurm, clone: Path, new_corpus: list[str]) -> None:
    """The names of the example's nodes are known to a proxy, as behind a cluster's login node."""
    config = GeneratorConfig(model="NAME", context_length=1024, concurrency=2, threads=1)
    with (
        embedded_server(config, clone / "server-1.log") as first,
        embedded_server(config, clone / "server-2.log") as second,
        proxy_of({"gpu-1:30000": first.url, "gpu-2:30000": second.url}) as (proxy, asked),
    ):
        there = {"HTTP_PROXY": proxy, "http_proxy": proxy, "no_proxy": ""}
        run(slurm, clone, [*example("servers"), *new_corpus, "method.generations=1"], there)
    assert set(asked) == {"gpu-1:30000", "gpu-2:30000"}
    assert "100.0% done" in status(slurm, clone)


@contextlib.contextmanager
def proxy_of(hosts: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """An HTTP proxy that knows where some hosts are; its URL, and the hosts of generations."""
    asked: list[str] = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.forward(None)

        def do_POST(self) -> None:
            self.forward(self.rfile.read(int(self.headers["Content-Length"])))

        def forward(self, body: bytes | None) -> None:
            url = urllib.parse.urlsplit(self.path)
            if url.path.endswith("/completions"):
                asked.append(url.netloc)
            request = urllib.request.Request(
                hosts[url.netloc] + url.path, body, {"Content-Type": "application/json"}
            )
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                request
            ) as response:
                content = response.read()
            self.send_response(response.status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def node_of(process: psutil.Process, job: str) -> str | None:
    """The node of Slurm that a process of a job (``12_0``) believes to be on."""
    try:
        found = process.environ()
    except psutil.Error:
        return None
    array, task = found.get("SLURM_ARRAY_JOB_ID"), found.get("SLURM_ARRAY_TASK_ID")
    return found.get("SLURMD_NODENAME") if f"{array}_{task}" == job else None
