"""What it costs to turn generations into batches, at three sizes, beside what others need.

    python -m benchmarks.data --output benchmarks/results/NAME.json

For each number of documents (x 32 generations of about 800 characters) it makes a corpus folder
without a model, then measures in processes of their own, by CPU time and by the most memory that
all processes held at once:

- tokenizing all texts once with ``tokenizers``' batch call, which nothing can undercut;
- judging them;
- ten streams (simple and stitched, G = 2, 4, 8, 16, 32) by ``generate.py streams``;
- two of these again, their texts tokenized already;
- opening a stream to train, and reading all of it, ours and with ``StreamingDataset``;
- the same texts through ``datasets.map`` and ``save_to_disk``, and through datatrove's
  ``DocumentTokenizer`` where it is installed.

``--memory`` adds sizes with short texts, for memory alone and for the report. Every cost is fitted
as a line over the sizes: a fixed part (starting, importing) and a slope, which is what large
corpora pay. The plan is measured at the paper's size and at ten billion tokens, with lengths drawn
at random. ``--loading`` seconds long, eight ranks read documents of about 700 tokens and megadocs
of 22,000 as if a model took 350,000 tokens a second each; that is by the clock and wants a machine
without other work. ``--only loading`` measures a part again and keeps what the file says of others.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data.reading import PLANS, READERS, loading_share, plan_costs
from benchmarks.data.stages import (
    GENERATIONS,
    SIZES,
    build_streams,
    judge,
    make_corpus,
    measured,
    open_stream,
    read_ours,
    read_streaming,
    report,
    resume,
    tokenize_once,
    with_datasets,
    with_datatrove,
)
from gen.corpus.documents import load_split
from trainer.files import write_json

RESULTS = Path(__file__).parents[1] / "results"
LONG, SHORT = 800, 100  # characters of a text
LOADED = (300, 2200)  # documents and characters of what is loaded
PARTS = ("loading", "sizes", "memory", "plans")
LARGE = {  # what is extrapolated to: generations, and tokens of them
    "the paper's run": (5_200_000, 3_700_000_000),
    "ten billion tokens": (14_100_000, 10_000_000_000),
}


def measure_size(documents: int, scratch: Path, peers: bool) -> dict[str, Any]:
    """Everything at one size."""
    root = scratch / f"corpus-{documents}"
    print(f"{documents:,} documents x {GENERATIONS}", flush=True)
    measured(make_corpus, root, documents, LONG)
    ten = [f"{kind}-g{size}" for size in SIZES for kind in ("simple", "stitched")]
    largest = [f"{kind}-g{GENERATIONS}" for kind in ("simple", "stitched")]
    train = sum(1 for _ in load_split(root, "train"))
    found = {
        "documents": train,
        "generations": train * GENERATIONS,
        "tokenize_once": measured(tokenize_once, root),
        "judge": measured(judge, root),
        "ten_streams": measured(build_streams, root, ten),
        "start": measured(build_streams, root, []),
        "two_again": measured(build_streams, root, largest),
        "open": measured(open_stream, root),
        "read": measured(read_ours, root),
        "read_streaming": measured(read_streaming, root),
    }
    if peers:
        found["datasets"] = measured(with_datasets, root)
        if importlib.util.find_spec("datatrove"):
            found["datatrove"] = measured(with_datatrove, root)
    shutil.rmtree(root)
    return found


def measure_memory(documents: int, scratch: Path) -> dict[str, Any]:
    """Memory alone, with short texts."""
    root = scratch / f"short-{documents}"
    print(f"{documents:,} documents x {GENERATIONS}, short texts", flush=True)
    measured(make_corpus, root, documents, SHORT)
    largest = [f"{kind}-g{GENERATIONS}" for kind in ("simple", "stitched")]
    found = {
        "generations": sum(1 for _ in load_split(root, "train")) * GENERATIONS,
        "resume": measured(resume, root),
        "judge": measured(judge, root),
        "report": measured(report, root),
        "build": measured(build_streams, root, largest),
        "open": measured(open_stream, root),
    }
    shutil.rmtree(root)
    return found


def measure_loading(scratch: Path, seconds: float) -> dict[str, Any]:
    """What eight ranks wait for documents and for megadocs."""
    documents, characters = LOADED
    root = scratch / "loaded"
    measured(make_corpus, root, documents, characters)
    names = {f"simple-g{GENERATIONS}": 4096, f"stitched-g{GENERATIONS}": 32_768}
    measured(build_streams, root, list(names))
    found: dict[str, Any] = {}
    for name, context in names.items():
        lengths = np.load(root / "streams" / name / "lengths.npy")
        found[name] = {"mean_tokens": float(lengths.mean())}
        for reader in READERS:
            found[name][reader] = loading_share(reader, root / "streams" / name, context, seconds)
            print(f"  {name} {reader}: {found[name][reader]}", flush=True)
    shutil.rmtree(root)
    return found


def line(rows: list[dict[str, Any]], part: str, value: str, over: str) -> dict[str, float]:
    """Fixed part and slope of a cost over a count that stands in the part or in the row."""
    counts = [row[part].get(over, row.get(over)) for row in rows]
    slope, fixed = np.polyfit(counts, [row[part][value] for row in rows], 1)
    return {"fixed": float(fixed), "slope": float(slope)}


def summary(rows: list[dict[str, Any]], memory: list[dict[str, Any]]) -> dict[str, Any]:
    """What the sizes say together."""
    last = rows[-1]
    tokenizing = line(rows, "tokenize_once", "cpu_seconds", "tokens")
    ten = line(rows, "ten_streams", "cpu_seconds", "generations")
    once = line(rows, "tokenize_once", "cpu_seconds", "generations")
    again = line(rows, "two_again", "cpu_seconds", "tokens")
    judging = line(rows, "judge", "cpu_seconds", "generations")
    found: dict[str, Any] = {
        "tokenize_once_tokens_per_cpu_second": 1 / tokenizing["slope"],
        "ten_streams_over_tokenizing_once": {
            "by_slopes": ten["slope"] / once["slope"],
            "at_the_largest_size": last["ten_streams"]["cpu_seconds"]
            / last["tokenize_once"]["cpu_seconds"],
        },
        "written_again_tokens_per_cpu_second": {
            "by_slope": 1 / again["slope"],
            "at_the_largest_size": last["two_again"]["tokens"] / last["two_again"]["cpu_seconds"],
        },
        "judging_milliseconds_a_generation": 1e3 * judging["slope"],
        "reading_tokens_per_cpu_second": {
            name: 1 / line(rows, part, "cpu_seconds", "tokens")["slope"]
            for name, part in (("ours", "read"), ("StreamingDataset", "read_streaming"))
        },
        "peers_tokens_per_cpu_second": {
            name: 1 / line(rows, name, "cpu_seconds", "tokens")["slope"]
            for name in ("datasets", "datatrove")
            if all(name in row for row in rows)
        },
    }
    if memory:
        found["memory"] = {
            part: {
                "fixed_megabytes": fit["fixed"],
                "bytes_a_generation": fit["slope"] * 1e6,
            }
            for part in ("resume", "judge", "report", "build", "open")
            if all(part in row for row in memory)
            for fit in [line(memory, part, "peak_megabytes", "generations")]
        }
    per_token = last["ten_streams"]["tokens"] / last["tokenize_once"]["tokens"]
    found["extrapolated"] = {
        name: {
            "cpu_hours": {
                "tokenizing once": tokens * tokenizing["slope"] / 3600,
                "judging": generations * judging["slope"] / 3600,
                "writing one simple and one stitched stream again": 2
                * tokens
                * again["slope"]
                / 3600,
                "ten streams": tokens * (tokenizing["slope"] + per_token * again["slope"]) / 3600,
            },
            "assumed": "costs grow in proportion to tokens, judging to generations, as they did "
            "over the three sizes; token ids fit the page cache or a disk that reads 700 bytes "
            "anywhere at once; cores share nothing but the disk",
        }
        for name, (generations, tokens) in LARGE.items()
    }
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """CPU time against size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    names = {
        "judge": "judging",
        "ten_streams": "ten streams, tokenizing included",
        "datasets": "datasets.map, one stream",
        "datatrove": "datatrove, one stream",
        "tokenize_once": "tokenizers' batch call, once",
        "two_again": "two streams again",
    }
    counts = [row["generations"] for row in rows]
    for part, name in names.items():
        if all(part in row for row in rows):
            axes.plot(counts, [row[part]["cpu_seconds"] for row in rows], "o-", label=name)
    axes.set_xlabel("generations")
    axes.set_ylabel("CPU seconds")
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, nargs="+", default=[2500, 5000, 10_000])
    parser.add_argument("--memory", type=int, nargs="*", default=[10_000, 20_000, 40_000])
    parser.add_argument("--loading", type=float, default=20.0, help="seconds of each")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument(
        "--only", choices=PARTS, nargs="+", default=PARTS, help="the others stay as they are"
    )
    parser.add_argument("--scratch", type=Path, help="folder for files that are deleted again")
    parser.add_argument("--output", type=Path, default=RESULTS / "data-2-core-cpu.json")
    options = parser.parse_args(arguments)
    before = json.loads(options.output.read_bytes()) if set(options.only) < set(PARTS) else {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        measures: dict[str, Callable[[], Any]] = {
            "loading": lambda: measure_loading(Path(folder), options.loading),
            "sizes": lambda: [
                measure_size(documents, Path(folder), not options.no_peers)
                for documents in options.documents
            ],
            "memory": lambda: [
                measure_memory(documents, Path(folder)) for documents in options.memory
            ],
            "plans": lambda: {name: measured(plan_costs, Path(folder), name) for name in PLANS},
        }
        found = {part: measure() for part, measure in measures.items() if part in options.only}
    from benchmarks.timing import processor  # imports torch, which none of the processes should

    parts: dict[str, Any] = {part: found.get(part, before.get(part)) for part in PARTS}
    result = {
        "command": "python -m benchmarks.data",
        "dates": {**before.get("dates", {}), **dict.fromkeys(found, time.strftime("%Y-%m-%d"))},
        "machine": f"{os.cpu_count()} cores, {processor()}",
        "versions": versions(),
        "summary": summary(parts["sizes"], parts["memory"]),
        **parts,
    }
    write_json(options.output, result)
    draw(parts["sizes"], options.output.with_suffix(".png"))
    print(json.dumps(result["summary"], indent=1))
    return result


def versions() -> dict[str, str]:
    """Of what is measured."""
    names = ("tokenizers", "pyarrow", "numpy", "mosaicml-streaming", "datasets", "datatrove")
    found: dict[str, Any] = {}
    for name in names:
        if importlib.util.find_spec(name.removeprefix("mosaicml-")):
            found[name] = importlib.metadata.version(name)
    return found


if __name__ == "__main__":
    main()
