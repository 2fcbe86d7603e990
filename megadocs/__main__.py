"""The command ``megadocs``: runs the script of that name, as ``python train.py`` does in a clone.

``megadocs train recipe=stitched``, ``torchrun --nproc-per-node 8 -m megadocs train ...``,
``megadocs benchmark cross_entropy --help``.
"""

import runpy
import sys

from megadocs import ROOT, __version__

PROGRAMS = ("generate", "train", "evaluate", "report")
BENCHMARKS = sorted(
    path.stem
    for path in (ROOT / "benchmarks").glob("[a-z]*.py")
    if 'if __name__ == "__main__"' in path.read_text()
)
USAGE = f"""\
usage: megadocs {{{",".join(PROGRAMS)}}} [KEY=VALUE ...] [--help]
       megadocs benchmark NAME [--help]
       megadocs --version

  generate    documents -> generations -> megadocs -> streams
  train       streams -> one trained model, or a sweep of them
  evaluate    losses and benchmarks of a run or an ensemble; export to Hugging Face
  report      a table, figures and a page of all runs
  benchmark   one of the microbenchmarks: {", ".join(BENCHMARKS)}

As several processes: torchrun --nproc-per-node 8 -m megadocs train ..."""


def main() -> None:
    """Run the program that the first argument names, in this process."""
    match sys.argv[1:]:
        case ["--version"]:
            print(f"megadocs {__version__} in {ROOT}")
            return
        case ["benchmark", name, *arguments] if name in BENCHMARKS:
            sys.argv[:] = [name, *arguments]
            sys.path.insert(0, str(ROOT))
            runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
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
