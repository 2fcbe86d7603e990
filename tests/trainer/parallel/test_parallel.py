"""Several processes on gloo: the loss curve of one process, elastic restarts, other rank counts."""

import json
import os
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from torch import multiprocessing

from gen.serving.supervisor import free_port
from tests.conftest import REPOSITORY, run_script, wait_until
from tests.trainer.conftest import StreamMaker
from tests.warm import Program
from trainer.config.schema import ModelConfig, Parallel, RuntimeConfig
from trainer.data.random_stream import random_windows
from trainer.loop import accumulate_gradients
from trainer.model.llama import Llama
from trainer.parallel.ranks import Ranks, parallelize, unused_part
from trainer.run.checkpoint import load_model
from trainer.run.progress import checkpoints, read_progress

ARGUMENTS = [
    "recipe=stitched",
    "recipe.generations=2",
    "recipe.epochs=1",
    "model=tiny",
    "data.context_length=64",
    "data.batch_size=4",
    "data.micro_batch_size=1",
    "data.mask=megadoc",
    "tracking.log_every=1",
    "checkpoint.count=1",
    "tracking.num_evaluations=1",
    "tracking.tensorboard=false",
    "runtime.num_threads=1",
    "name=run",
]


def torchrun(processes: int) -> list[str]:
    """Ranks are forked from torchrun, which has imported what they need."""
    return [
        *("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
        *("--run-path", "--start-method=fork", str(REPOSITORY / "train.py")),
    ]


def curve(output: Path) -> torch.Tensor:
    rows = [json.loads(line) for line in (output / "run/metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row["train/loss"] for row in rows if "train/loss" in row])


@pytest.fixture(scope="session")
def alone(corpus_root: Path) -> Path:
    """The run of one process, shared by all tests."""
    output = corpus_root.parent / "alone"
    with FileLock(corpus_root.parent / "alone.lock"):
        if not (output / "run" / "result.json").exists():
            run_script("train.py", *ARGUMENTS, f"data.root={corpus_root}", f"output={output}")
    return output


def same_learning(output: Path, alone: Path) -> None:
    """Equal until rounding has been amplified by the optimiser, and close to the end."""
    ours, theirs = curve(output), curve(alone)
    torch.testing.assert_close(ours[:6], theirs[:6], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    weights, right = (load_model(path / "run")[0].state_dict() for path in (output, alone))
    for name in right:
        assert (weights[name] - right[name]).norm() <= 1e-3 * right[name].norm(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (2, ["runtime.parallel=ddp"]),
        (2, ["runtime.parallel=fsdp"]),
        (4, ["runtime.parallel=fsdp", "runtime.shard_size=2"]),
        (2, ["runtime.context_parallel=2"]),
        (4, ["runtime.context_parallel=4"]),
        (4, ["runtime.context_parallel=2", "runtime.parallel=fsdp"]),
    ],
)
def test_many_processes_learn_what_one_does(
    corpus_root: Path, alone: Path, tmp_path: Path, processes: int, options: list[str]
) -> None:
    where = [f"data.root={corpus_root}", f"output={tmp_path}"]
    run_script(*torchrun(processes), *ARGUMENTS, *options, *where)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    same_learning(tmp_path, alone)


def one_and_two_processes(folder: Path, options: list[str], *shared: str) -> tuple[Path, Path]:
    """A short run of one process, and of two with the options ``shared`` as well."""
    outputs = (folder / "one", folder / "two")
    programs = (["train.py"], [*torchrun(2), *shared])
    for program, output in zip(programs, outputs, strict=True):
        run_script(*program, *ARGUMENTS, *options, "recipe.epochs=0.3", f"output={output}")
    return outputs


@pytest.mark.slow
def test_a_student_learns_the_same_with_its_windows_shared_out(
    corpus_root: Path, alone: Path, tmp_path: Path
) -> None:
    teacher = [f"distillation.teachers=[{alone / 'run'}]", "distillation.alpha=0.9"]
    options = [f"data.root={corpus_root}", *teacher]
    one, two = one_and_two_processes(tmp_path, options, "runtime.context_parallel=2")
    same_learning(two, one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["optimizer.kind=muon", "optimizer.averaging=ema"],  # Muon orthogonalises in bfloat16
        ["runtime.dtype=bfloat16"],
    ],
)
def test_half_precision_differs_by_its_noise_alone(
    corpus_root: Path, tmp_path: Path, options: list[str]
) -> None:
    options = [f"data.root={corpus_root}", *options]
    one, two = one_and_two_processes(tmp_path, options, "runtime.parallel=fsdp")
    torch.testing.assert_close(curve(two), curve(one), atol=5e-3, rtol=0)


def kill(process: psutil.Popen) -> None:
    """SIGKILL a process and all below it."""
    everything = [process, *process.children(recursive=True)]
    for each in everything:
        each.kill()
    psutil.wait_procs(everything, timeout=30)


@pytest.mark.slow
def test_killed_ranks_and_nodes_restart_and_another_number_of_ranks_goes_on(
    corpus_root: Path, alone: Path, tmp_path: Path
) -> None:
    """SIGKILL for a rank of two nodes, for a node, which is replaced, and for all; one goes on."""
    arguments = [*ARGUMENTS, f"data.root={corpus_root}", f"output={tmp_path}"]
    run, log = tmp_path / "run", tmp_path / "output"
    agent = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"),
        *("--max-restarts=3", "--rdzv-id=test", "--rdzv-backend=c10d"),
        f"--rdzv-endpoint=localhost:{free_port()}",
    ]
    script = ["train.py", *arguments, "runtime.parallel=fsdp", "checkpoint.count=1000"]
    # What README says for several nodes.
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

    def start_node(is_head: bool) -> psutil.Popen:
        notice = f"--rdzv-conf=is_host={is_head:d},keep_alive_interval=1,keep_alive_max_attempt=3"
        with log.open("a") as output:
            return psutil.Popen(
                [*agent, notice, *script],
                cwd=REPOSITORY,
                env=environment,
                stdout=output,
                stderr=output,
            )

    def newest_step() -> int:
        found = checkpoints(run)
        return read_progress(found[-1]).step if found else 0

    def wait_for_steps() -> None:
        before = newest_step()

        def went_on() -> bool:
            assert all(node.poll() is None for node in nodes), log.read_text()[-3000:]
            return newest_step() > before + 1

        wait_until(went_on, seconds=180)

    nodes = [start_node(is_head=True), start_node(is_head=False)]
    try:
        wait_for_steps()
        nodes[1].children()[0].kill()
        wait_for_steps()
        kill(nodes[1])
        nodes[1] = start_node(is_head=False)
        wait_for_steps()
    finally:
        for node in nodes:
            if node.is_running():
                kill(node)
    assert len(re.findall(r"resuming .* after step \d+", log.read_text())) >= 2
    last = run_script("train.py", *arguments)
    assert "resuming" in last.stdout
    same_learning(tmp_path, alone)


@pytest.mark.slow
def test_torchrun_that_is_told_to_end_gives_its_ranks_time_to_save(
    make_stream: StreamMaker, tmp_path: Path
) -> None:
    """It ends with its own traceback and status, which is torch's to say; nothing is lost."""
    for name in ("real", "val"):
        make_stream(name, [[40, 24]] * 16)
    run = tmp_path / "run"
    alone = [option for option in ARGUMENTS if not option.startswith("recipe")]
    command = [*torchrun(2), *alone, f"data.root={tmp_path}", f"output={tmp_path}"]
    command.append("recipe.epochs=20")
    with Program(*command) as agent:
        wait_until(lambda: (run / "metrics.jsonl").exists() and len(curve(tmp_path)) > 1)
        ranks = psutil.Process(agent.pid).children()
        agent.send_signal(signal.SIGTERM)
        output, errors = agent.communicate(timeout=90)
    assert agent.returncode not in (0, None)
    assert all(not rank.is_running() for rank in ranks)
    (newest,) = checkpoints(run)
    step = read_progress(newest).step
    assert step == len(curve(tmp_path)) < 80
    assert f"stopped at step {step} of 80" in output
    assert "error: " not in errors
    assert not list(newest.parent.glob(".*"))
    assert f"after step {step}" in run_script(*command).stdout
    assert (run / "result.json").exists()


def agree(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    ranks = Ranks(rank, 2, torch.device("cpu"), host_group=dist.group.WORLD)
    assert ranks.sum_on_hosts(rank == 1) == 1
    assert ranks.sum_on_hosts(True) == 2
    dist.destroy_process_group()


def test_flags_are_counted_over_the_ranks(tmp_path: Path) -> None:
    multiprocessing.start_processes(
        agree, (str(tmp_path / "store"),), nprocs=2, start_method="fork"
    )


def gradients(rank: int, folder: str, attempt: str, steps: list[int]) -> None:
    """The gradients of the last of some steps, in a process of four that have begun anew."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store-{attempt}", 4)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4)
    config = ModelConfig(32, 64, 2, 2, 2, vocab_size=99)
    model = Llama(config, 0, torch.float32)
    ranks = Ranks(rank, 4, torch.device("cpu"))
    wrapped = parallelize(model, ranks, RuntimeConfig(parallel=Parallel.ddp))
    for step in steps:
        model.zero_grad(set_to_none=True)
        first = 3 + 4 * step + rank  # tokens of the first document: every rank has other ones
        accumulate_gradients(wrapped, [random_windows([[first, 32 - first]], 32, 99)], ranks)
    if rank == 0:
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        torch.save(found, f"{folder}/{attempt}.pt")
    dist.destroy_process_group()


def test_gradients_of_four_ranks_are_the_same_when_they_have_begun_anew(tmp_path: Path) -> None:
    """Bit for bit: DDP's buckets must not depend on how many steps a process has taken."""
    found = []
    for attempt, steps in (("on", [0, 1]), ("anew", [1])):
        arguments = (str(tmp_path), attempt, steps)
        multiprocessing.start_processes(gradients, arguments, nprocs=4, start_method="fork")
        found.append(torch.load(tmp_path / f"{attempt}.pt"))
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0
        assert torch.equal(gradient, found[1][name]), name


def test_ranks_meet_in_a_store_with_remains_of_earlier_attempts() -> None:
    store = dist.HashStore()

    def meet(rank: int) -> dist.Store:
        return unused_part(store, rank, 3, timedelta(seconds=20))

    for _ in range(3):  # attempts
        with ThreadPoolExecutor(3) as pool:
            parts = list(pool.map(meet, range(3)))
        assert not any(part.check(["key"]) for part in parts)
        parts[0].set("key", "here")
        assert {part.get("key") for part in parts} == {b"here"}
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] of 3 have not joined"):
        unused_part(store, 0, 3, timedelta(seconds=0.2))


def test_ranks_that_do_not_fit(corpus_root: Path, tmp_path: Path) -> None:
    done = run_script(
        "train.py",
        *ARGUMENTS,
        "runtime.context_parallel=2",
        f"data.root={corpus_root}",
        f"output={tmp_path}",
        check=False,
    )
    assert done.returncode == 1
    assert "runtime.context_parallel=2 does not divide the 1 ranks" in done.stderr
