"""The table of what was measured on GPUs, from ``benchmarks/results/<gpu>/``.

    python -m benchmarks.table            # print it
    python -m benchmarks.table --write    # put it into docs/gpu.md

A figure that nobody has measured is an empty cell beside the command that measures it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"
BEGIN, END = "<!-- GPU table: python -m benchmarks.table --write -->", "<!-- end -->"
Value = Callable[[dict[str, Any]], str]


@dataclass(frozen=True)
class Figure:
    """A line: the step of ``benchmarks/gpu.py`` that measures it, and where its value lies."""

    label: str
    step: str
    target: str
    value: Value


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a benchmark's file that have not failed."""
    found = result["results"]
    return [row for row in (found["rows"] if isinstance(found, dict) else found) if good(row)]


def good(row: dict[str, Any]) -> bool:
    return "failed" not in row


def chosen(what: str) -> Value:
    """Which backend the self-check chose, and how far ahead it was."""
    return lambda result: str(result["results"][what]["line"]).partition(": ")[2]


def memory(backend: str) -> Value:
    """GiB by number of segments."""

    def value(result: dict[str, Any]) -> str:
        found = []
        for row in result["results"]:
            if row["backend"] != backend:
                continue
            size = "failed" if not good(row) else f"{row['peak_bytes'] / 2**30:.1f}"
            found.append(f"{size} ({row['segments']:,})")
        return ", ".join(found)

    return value


def step_speed(*ways: str) -> Value:
    """MFU and tokens/s of the fastest of some ways."""

    def value(result: dict[str, Any]) -> str:
        found = [row for row in rows(result) if row["way"] in ways]
        best = max(found, key=lambda row: row["tokens_per_second"])
        share = "" if best["mfu"] is None else f"{best['mfu']:.1%} MFU, "
        return f"{share}{best['tokens_per_second']:,.0f} tokens/s ({best['way']})"

    return value


def over_peers(pack: str, which: str) -> Value:
    """Speed of our best attention over the best of FA-3 and FA-4, else of all peers."""
    ours = ("triton", "gluon", "gluon_split")

    def value(result: dict[str, Any]) -> str:
        found = {
            row["provider"]: row["seconds"]["median"]
            for row in rows(result)
            if row["pack"] == pack and row["pass"] == which
        }
        best = min((name for name in found if name in ours), key=found.__getitem__)
        peers = [name for name in ("fa3", "fa4") if name in found]
        peers = peers or [name for name in found if not name.startswith(ours)]
        peer = min(peers, key=found.__getitem__)
        return f"{found[peer] / found[best]:.2f} x {peer} ({best})"

    return value


def over_floor(result: dict[str, Any]) -> str:
    """Time of our fastest loss over its three matrix products."""
    found = [row for row in rows(result) if row["provider"].startswith("ours")]
    best = min(found, key=lambda row: row["ratio_to_floor"])
    return f"{best['ratio_to_floor']:.2f} ({best['provider']})"


def summary(result: dict[str, Any]) -> str:
    return re.sub(r"^=+ | =+$", "", str(result["summary"]))


FIGURES = [
    Figure("attention that `auto` takes, 300M heads", "check-300m", "ours", chosen("attention")),
    Figure("loss that `auto` takes, 300M", "check-300m", "", chosen("loss")),
    Figure(
        "GiB of FlashAttention's backward pass (segments)", "varlen-memory", "", memory("flash")
    ),
    Figure("the same of cuDNN's", "varlen-memory", "", memory("cudnn")),
    Figure(
        "300M, 64k tokens, 4k context, mask none",
        "step-300m-4k-none",
        "50 % MFU",
        step_speed("torch loss", "triton loss", "ours"),
    ),
    Figure(
        "300M, 64k tokens, 4k context, documents of 1,200",
        "step-300m-4k-megadoc",
        "",
        step_speed("torch loss", "triton loss", "ours"),
    ),
    Figure("tests marked gpu", "tests", "all pass", summary),
    Figure("attention forward, one document", "attention", "0.97", over_peers("one", "forward")),
    Figure("attention backward, one document", "attention", "1.0", over_peers("one", "backward")),
    Figure(
        "attention forward, short documents",
        "attention",
        "1.2",
        over_peers("lognormal", "forward"),
    ),
    Figure("loss over its three matrix products", "loss", "1.08", over_floor),
    Figure("300M, 32k context", "step-300m-32k", "46 % MFU", step_speed("ours")),
    Figure("300M, 128k context", "step-300m-128k", "", step_speed("ours")),
    Figure("1.5B, 4k context", "step-1_5b-4k", "", step_speed("ours")),
    Figure("1.5B, 32k context", "step-1_5b-32k", "", step_speed("ours")),
]


def folder_name(device: str) -> str:
    """The results folder of a GPU by its name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def value_of(figure: Figure, folder: Path) -> str:
    """What was measured; nothing where there is no file, or its step has no such row."""
    file = folder / f"{figure.step}.json"
    if not file.exists():
        return ""
    try:
        return figure.value(json.loads(file.read_text()))
    except (KeyError, ValueError):  # every candidate failed; the file says why
        return "failed, see the file"


def text(folder: Path) -> str:
    """Each figure beside its target, for a terminal."""
    lines = [[figure.label, figure.target, value_of(figure, folder)] for figure in FIGURES]
    return tabulate(lines, ["figure", "target", "measured"], "plain", disable_numparse=True)


def markdown(results: Path = RESULTS) -> str:
    """The table of all GPUs that something was measured on."""
    gpus = sorted(path.parent for path in results.glob("*/state.json"))
    head = ["figure", "target", *(gpu.name for gpu in gpus), "command"]
    lines = [head, ["---"] * len(head)]
    for figure in FIGURES:
        values = [value_of(figure, gpu) for gpu in gpus]
        command = f"`python -m benchmarks.gpu --steps {figure.step}`"
        lines.append([figure.label, figure.target, *values, command])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_table(page: str, results: Path = RESULTS) -> str:
    """The page with the newest table between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{markdown(results)}\n\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="into docs/gpu.md")
    if parser.parse_args(arguments).write:
        PAGE.write_text(with_table(PAGE.read_text()))
    else:
        print(markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
