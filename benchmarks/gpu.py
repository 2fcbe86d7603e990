"""Everything that a new GPU should be asked, the most valuable first.

    python -m benchmarks.gpu --minutes 9      # also: make gpu
    python -m benchmarks.gpu --rehearse       # the same list on a CPU at tiny sizes

Every step writes its own file to ``benchmarks/results/<gpu>/`` as soon as it ends. A run stops in
time; the next one goes on with the steps that are not done, and does those again that have failed
if the code has changed since. It ends with each figure beside its target.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks import table, timing
from kernels.check.verdicts import source_hash
from trainer.files import write_json

ROOT = Path(__file__).parents[1]
CHECK = "kernels.check.__main__"
TUNED = "--head-dims 64 --groups 1"
TINY_STEP = "--models tiny --contexts 64 --tokens 128 --rounds 1"
LOSSES = "--ways 'torch loss' 'triton loss'"


@dataclass(frozen=True)
class Step:
    """``python -m module arguments --output FILE``; in a rehearsal with other arguments."""

    name: str
    module: str
    arguments: str
    rehearsal: str | None  # None: it cannot run without a GPU

    def command(self, output: Path) -> list[str]:
        """What is run on a GPU."""
        if self.module == "pytest":
            return [sys.executable, "-m", "pytest", *shlex.split(self.arguments)]
        if self.module == "make":
            return ["make", *shlex.split(self.arguments), f"PY={sys.executable}"]
        words = [*shlex.split(self.arguments), "--output", str(output)]
        return [sys.executable, "-m", self.module, *words]


STEPS = [
    Step(
        "check-300m",
        "kernels.check",
        "--heads 12/12x64 --width 768",
        "--heads 2/1x16 --tokens 64 --width 32 --vocabulary 100",
    ),
    Step("varlen-memory", "benchmarks.varlen_memory", "", ""),
    *(
        Step(
            f"step-300m-4k-{mask}",
            "benchmarks.train_step",
            f"--models 300m --contexts 4096 --documents {document} {LOSSES} --rounds 10",
            f"{TINY_STEP} --documents {small} --ways ours",
        )
        for mask, document, small in (("none", 0, 0), ("megadoc", 1200, 20))
    ),
    Step(
        "tests",
        "pytest",
        "-m gpu -q --timeout 300 -p no:cacheprovider tests/kernels tests/trainer/test_gpu.py",
        "-m gpu -q --collect-only tests/kernels/attention/test_triton.py",
    ),
    Step(
        "attention",
        "benchmarks.attention",
        "--packs one lognormal megadocs --heads 12/12x64 --rounds 10",
        "--packs '8 equal' --rounds 1 --providers torch --passes forward",
    ),
    Step(
        "loss",
        "benchmarks.cross_entropy",
        "--shapes 65536x768x128256 --rounds 10",
        "--shapes 32x16x100 --rounds 1 --providers ours plain",
    ),
    *(
        Step(
            f"step-300m-{context // 1024}k",
            "benchmarks.train_step",
            f"--models 300m --contexts {context} --documents 0 --ways ours --rounds 5",
            f"{TINY_STEP} --documents 0 --ways ours",
        )
        for context in (32_768, 131_072)
    ),
    Step(
        "check-1_5b",
        "kernels.check",
        "--heads 16/16x96 --width 1536",
        "--heads 2/2x24 --tokens 64 --width 16 --vocabulary 50",
    ),
    *(
        Step(
            f"step-1_5b-{context // 1024}k",
            "benchmarks.train_step",
            f"--models 1_5b --contexts {context} --documents 0 --ways ours --rounds 5",
            f"{TINY_STEP} --documents 20 --ways ours",
        )
        for context in (4096, 32_768)
    ),
    Step(
        "attention-peers",
        "benchmarks.attention",
        "--packs one lognormal --heads 16/8x128 16/16x96 --rounds 10",
        None,
    ),
    Step("tune", "benchmarks.tune_attention", TUNED, None),
    Step("demo", "make", "demo", "--dry-run demo"),
]


class State:
    """What is done, in ``state.json`` of the results."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "state.json"
        self.done: dict[str, dict[str, Any]] = {}
        if self.file.exists():
            self.done = json.loads(self.file.read_text())

    def open(self, step: Step) -> bool:
        """Whether a step is still to be done."""
        found = self.done.get(step.name)
        if found is None:
            return True
        return bool(found["failed"]) and bool(found["sources"] != source_hash())

    def add(self, step: Step, failed: str, seconds: float) -> None:
        self.done[step.name] = {
            "failed": failed,
            "seconds": round(seconds, 1),
            "sources": source_hash(),
        }
        write_json(self.file, self.done)


def run(step: Step, folder: Path, seconds: float) -> str | None:
    """Run a step on a GPU; why it failed, "" if it did not, None if the time was up."""
    log = folder / "logs" / f"{step.name}.txt"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            step.command(folder / f"{step.name}.json"),
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=max(0.0, seconds))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    if step.module == "pytest":
        content = {"command": shlex.join(step.command(log)), "summary": lines[-1] if lines else ""}
        content |= timing.environment()
        (folder / f"{step.name}.json").write_text(json.dumps(content, indent=1) + "\n")
    return "" if code == 0 else f"exit {code}: {lines[-1][:300] if lines else 'no output'}"


def rehearse(step: Step, folder: Path) -> str:
    """Run a step at its tiny size; why it failed, or nothing."""
    if step.rehearsal is None:
        return ""
    words = shlex.split(step.rehearsal)
    if step.module in ("pytest", "make"):
        command = [sys.executable, "-m", "pytest"] if step.module == "pytest" else ["make"]
        done = subprocess.run(
            [*command, *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return "" if done.returncode == 0 else done.stdout[-500:] + done.stderr[-500:]
    module = importlib.import_module(step.module if step.module != "kernels.check" else CHECK)
    output = folder / f"{step.name}.json"
    try:
        code = module.main([*words, "--output", str(output)])
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        return timing.reason(error)  # type: ignore[arg-type]
    return "" if not code and output.exists() else f"exit {code}, or no {output}"


def rehearse_all(steps: list[Step]) -> int:
    """1 if a step has failed; nothing that is measured here is kept."""
    with tempfile.TemporaryDirectory() as folder:
        failed = {step.name: rehearse(step, Path(folder)) for step in steps}
    went = {
        step.name: failed[step.name] or ("needs a GPU" if step.rehearsal is None else "rehearsed")
        for step in steps
    }
    print(tabulate(went.items(), tablefmt="plain"))
    return int(any(failed.values()))


def main(arguments: list[str] | None = None) -> int:
    """0 if every step that was tried went well."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so long")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at tiny sizes")
    parser.add_argument("--steps", nargs="*", default=[], help="names; default: all")
    options = parser.parse_args(arguments)
    if unknown := set(options.steps) - {step.name for step in STEPS}:
        parser.error(f"unknown steps {sorted(unknown)}; there are {[step.name for step in STEPS]}")
    chosen = [step for step in STEPS if not options.steps or step.name in options.steps]
    if options.rehearse:
        return rehearse_all(chosen)
    if not torch.cuda.is_available():
        print("error: no CUDA device; --rehearse runs the same list on a CPU at tiny sizes")
        return 1
    deadline = time.monotonic() + 60 * options.minutes
    folder = timing.RESULTS / table.folder_name(torch.cuda.get_device_name())
    folder.mkdir(parents=True, exist_ok=True)
    state = State(folder)
    went_well = True
    for step in chosen:
        if not options.steps and not state.open(step):
            continue
        began = time.monotonic()
        print(f"{step.name}: {shlex.join(step.command(folder / f'{step.name}.json'))}", flush=True)
        failed = run(step, folder, deadline - began)
        seconds = time.monotonic() - began
        if failed is None:
            print(f"the time is up; {step.name} starts again in the next run")
            break
        state.add(step, failed, seconds)
        went_well &= not failed
        print(f"{step.name}: {failed or 'done'} ({seconds:.0f} s)", flush=True)
    print(table.text(folder))
    return int(not went_well)


if __name__ == "__main__":
    sys.exit(main())
