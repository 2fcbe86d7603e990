"""The command ``megadocs``: runs the script of that name, as ``python train.py`` does in a clone.

``megadocs train recipe=stitched``, ``torchrun --nproc-per-node 8 -m megadocs train ...``,
``megadocs -m kernels.check``.
"""

import runpy
import sys

from megadocs import ROOT, __version__

FOLDERS = ("kernels", "trainer", "gen", "benchmarks")
PROGRAMS = ("generate", "train", "evaluate", "report")
USAGE = f"""\
usage: megadocs {{{",".join(PROGRAMS)}}} [KEY=VALUE ...] [--help]
       megadocs -m MODULE [...]
       megadocs --version

  generate    documents -> generations -> megadocs -> streams
  train       streams -> one trained model, or a sweep of them
  evaluate    losses and benchmarks of a run or an ensemble; export to Hugging Face
  report      a table, figures and a page of all runs
  -m MODULE   kernels.check, benchmarks.attention, gen.serving.sglang_environment, ...

On several processes: torchrun --nproc-per-node 8 -m megadocs train ..."""


def main() -> None:
    """Run the program that the first argument names, in this process."""
    match sys.argv[1:]:
        case ["--version"]:
            print(f"megadocs {__version__} in {ROOT}")
            return
        case ["-m", module, *arguments] if module.split(".")[0] in FOLDERS:
            sys.argv[:] = [module, *arguments]
            sys.path.insert(0, str(ROOT))
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            return
        case [program, *arguments] if program in PROGRAMS:
            script = str(ROOT / f"{program}.py")
            sys.argv[:] = [script, *arguments]
            sys.path.insert(0, str(ROOT))  # where Python puts the folder of a script
            runpy.run_path(script, run_name="__main__")
            return
        case ["-h" | "--help"]:
            print(USAGE)
            return
        case [other, *_]:
            print(f"error: {other} is no program of megadocs\n{USAGE}", file=sys.stderr)
        case _:
            print(USAGE, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
