"""How long saving and loading a checkpoint takes, by model and number of processes.

    python -m benchmarks.saving --models 150m 300m --ranks 1 2

What is saved is what a run saves: weights and AdamW's two moments in fp32, 12 bytes a parameter, by
FSDP's ranks side by side or by one process alone. ``blocked`` is how long training stands still for
it; ``named`` is from the same start until the checkpoint is on the disk, hashed and has its name:
that is the grace a run needs between a signal and its end; ``cpu`` is what all processes computed
meanwhile, which other work on the machine does not change. ``loaded`` is what a start spends on
checking and reading it. Beside them what this disk and this processor give alone: a file of
a gigabyte written and synced, and SHA-256 of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import timing
from benchmarks.train_step import VOCABULARY, model_config
from kernels import clock
from trainer.config.schema import OptimizerConfig, Parallel, RecipeConfig, RuntimeConfig
from trainer.model.llama import Llama
from trainer.optim.optimizer import build_optimizers
from trainer.parallel.ranks import Ranks, join_ranks, parallelize
from trainer.run.checkpoint import Checkpointer, load_checkpoint, newest_whole
from trainer.run.progress import Progress, checkpoints

GIGABYTE = 10**9


def measure(name: str, folder: Path, rounds: int) -> None:
    """Save and load in this process, one of those that torchrun started; rank 0 prints seconds."""
    with join_ranks(RuntimeConfig(parallel=Parallel.fsdp)) as ranks:
        model = Llama(model_config(name, VOCABULARY), 0, torch.float32)
        wrapped = parallelize(model.to(ranks.device), ranks, RuntimeConfig(parallel=Parallel.fsdp))
        optimizers = build_optimizers(wrapped, OptimizerConfig(), RecipeConfig())
        for parameter in wrapped.parameters():  # the moments come with the first step
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        saver = Checkpointer(folder, wrapped, optimizers, None, ranks, keep=1)
        for step in range(1 + rounds):  # the first save makes the buffers
            began, computed = seconds_of_all(ranks), time.process_time()
            saver.save(Progress(step, "", "", 0.0))
            blocked = seconds_of_all(ranks)
            saver.finish()
            named = seconds_of_all(ranks)
            cpu = sum(ranks.gather_on_hosts(time.process_time() - computed))
            checkpoint = newest_whole(folder, ranks)
            assert checkpoint is not None
            load_checkpoint(checkpoint, wrapped, optimizers, None, ranks)
            loaded = seconds_of_all(ranks)
            if ranks.is_main:
                files = [file for file in checkpoints(folder)[-1].iterdir() if file.is_file()]
                row = {
                    "parameters": model.config.parameter_count(),
                    "bytes": sum(file.stat().st_size for file in files),
                    "blocked": blocked - began,
                    "named": named - began,
                    "cpu": cpu,
                    "loaded": loaded - named,
                }
                print(json.dumps(row), flush=True)


def seconds_of_all(ranks: Ranks) -> float:
    """The time when all ranks are here, their GPUs idle."""
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    ranks.barrier()
    return time.perf_counter()


def measured(name: str, ranks: int, folder: Path, rounds: int) -> dict[str, float]:
    """Medians over the rounds of a new group of processes, and seconds a gigabyte of them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", "-m", "benchmarks.saving", "--measure", name]
    done = subprocess.run(
        [*command, "--folder", str(folder), "--rounds", str(rounds)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    shutil.rmtree(folder)
    _, *rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    gigabytes = found["bytes"] / GIGABYTE
    return found | {
        f"{key}_a_gigabyte": found[key] / gigabytes for key in ("blocked", "named", "cpu", "loaded")
    }


def alone(folder: Path, rounds: int) -> dict[str, float]:
    """Seconds to write and sync a gigabyte, and to hash it."""
    content = os.urandom(GIGABYTE // 100) * 100
    path = folder / "gigabyte"

    def write() -> None:
        with path.open("wb") as file:
            file.write(content)
            os.fsync(file.fileno())

    return {
        "written": median_of(write, rounds),
        "hashed": median_of(lambda: hashlib.sha256(content), rounds),
    }


def median_of(call: Callable[[], object], rounds: int) -> float:
    return statistics.median(clock.seconds_of(call, torch.device("cpu")) for _ in range(rounds))


def main() -> None:
    parser = timing.arguments(str(__doc__).splitlines()[0], "saving")
    parser.add_argument("--models", nargs="+", default=["150m", "300m"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--folder", type=Path, help="on the disk in question; a temporary one")
    parser.add_argument("--measure", help="in this process, for one that torchrun started")
    parser.set_defaults(rounds=3)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.folder, options.rounds)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        found = {"a gigabyte": alone(Path(temporary), options.rounds)}
        print(found)
        for name in options.models:
            for ranks in options.ranks:
                row = measured(name, ranks, Path(temporary) / "run", options.rounds)
                found[f"{name}, {ranks} processes"] = row
                print(f"{name}, {ranks} processes: {row}")
    command = f"python -m benchmarks.saving --models {' '.join(options.models)}"
    command += f" --ranks {' '.join(map(str, options.ranks))} --rounds {options.rounds}"
    timing.write_results(options.output, command, found)


if __name__ == "__main__":
    main()
