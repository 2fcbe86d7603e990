"""Whether fitted laws deserve belief: exact laws come back, intervals cover as they say.

    python -m benchmarks.law_coverage

10,000 random power laws are fitted to their own exact values. Then 1,000 studies are planted: a
power law, 3 to 8 sizes of corpus, one to three seeds with normal noise, in a third of the studies
one loss that is off by 5 to 20 times the noise. For each the 95 % intervals of the curve and of a
recipe's data efficiency are asked for, and whether the planted value lies inside; then of a recipe
one of whose own losses is as far off. One core is enough. What was found is kept beside the result
as it is found, so a call that was ended goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from benchmarks.timing import arguments, write_results
from trainer.files import sha256
from trainer.study import laws, points, scaling_laws
from trainer.study.laws import POWER
from trainer.study.points import Points
from trainer.study.scaling_laws import data_efficiency, fit_law

LARGEST = 1.6e9  # tokens of the largest planted corpus


def exact_law(number: int) -> float:
    """The worst relative error of B and C of a random law whose values are given exactly."""
    generator = np.random.default_rng((0, number))
    asymptote, exponent = generator.uniform(0.5, 3.5), generator.uniform(0.1, 1.5)
    scale = 10 ** generator.uniform(0, 9)
    amplitude = generator.uniform(0.05, 2.0) * scale**exponent
    x = scale * np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    values = np.array([amplitude, asymptote, exponent])
    losses = POWER.predict(values, x[:, None])
    found = fit_law(POWER, Points(x, losses[:, None]), replicates=0).values
    return float(np.abs(found / values - 1)[1:].max())


def planted_study(number: int) -> dict[str, Any]:
    """One study and which of its intervals hold the planted value; None where there is none."""
    generator = np.random.default_rng((1, number))
    sizes, seeds = int(generator.integers(3, 9)), int(generator.integers(1, 4))
    exponent, asymptote = generator.uniform(0.15, 0.6), generator.uniform(1.0, 3.0)
    x = LARGEST / 2.0 ** np.arange(sizes)[::-1]
    values = np.array([generator.uniform(0.3, 2.0) * x[0] ** exponent, asymptote, exponent])
    noise = 10 ** generator.uniform(-3.3, -2)
    losses = POWER.predict(values, x[:, None])[:, None] + generator.normal(0, noise, (sizes, seeds))
    outlier = bool(generator.random() < 1 / 3)
    if outlier:
        far = noise * generator.uniform(5, 20) * generator.choice((-1, 1))
        losses[generator.integers(sizes), generator.integers(seeds)] += far
    fit = fit_law(POWER, Points(x, losses), replicates=200, seed=0)
    base = x[sizes // 2]
    factor = generator.uniform(1.1, 1.9)
    loss = POWER.predict(values, np.array([[base * factor]]))[0]
    recipe = loss + generator.normal(0, noise, seeds)
    interval = data_efficiency(fit, recipe.tolist(), base).interval
    recipe[0] += noise * generator.uniform(5, 20) * generator.choice((-1, 1))
    beside = data_efficiency(fit, recipe.tolist(), base).interval
    middle = np.array([x[sizes // 2] * 1.4])
    low, high = fit.predict_interval(middle)
    truth = POWER.predict(values, middle[:, None])[0]
    asked = bool(np.isfinite(low[0]))
    return {
        "points": sizes,
        "seeds": seeds,
        "outlier": outlier,
        "curve": bool(low[0] <= truth <= high[0]) if asked else None,
        "efficiency": bool(interval.low <= factor <= interval.high) if asked else None,
        "recipe_off": bool(beside.low <= factor <= beside.high) if asked else None,
        "width": float(interval.high - interval.low) if asked else None,
    }


def coverage(studies: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of the intervals that hold the truth, over all and by kind of study."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for study in studies:
        if study["curve"] is None:
            continue
        several = "several seeds" if study["seeds"] > 1 else "one seed"
        kind = "with an outlier" if study["outlier"] else "clean"
        size = f"{study['points']} points"
        for name in ("all", kind, f"{several}, {kind}", f"{several}, {kind}, {size}"):
            groups[name].append(study)
    return {
        name: {
            "studies": len(group),
            "curve": round(float(np.mean([one["curve"] for one in group])), 3),
            "efficiency": round(float(np.mean([one["efficiency"] for one in group])), 3),
            "recipe_off": round(float(np.mean([one["recipe_off"] for one in group])), 3),
            "median_width": round(float(np.median([one["width"] for one in group])), 4),
        }
        for name, group in sorted(groups.items())
    }


def kept(file: Path, count: int, work: Callable[[int], Any]) -> list[Any]:
    """``work`` of 0 to ``count - 1``; what an earlier call has found is read from ``file``."""
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    with file.open("a") as lines:
        for number in range(len(found), count):
            found.append(work(number))
            print(json.dumps(found[-1]), file=lines, flush=True)
    return found[:count]


def version() -> str:
    """Changes with the code that fits and the code that plants."""
    modules = [Path(str(module.__file__)) for module in (laws, points, scaling_laws)]
    return hashlib.sha256("".join(map(sha256, [*modules, Path(__file__)])).encode()).hexdigest()[:8]


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0], "law-coverage")
    parser.add_argument("--laws", type=int, default=10_000)
    parser.add_argument("--studies", type=int, default=1_000)
    options = parser.parse_args()
    parts = options.output.with_suffix("")  # files beside the result, of this version of the code
    errors = kept(parts.with_suffix(f".{version()}.laws"), options.laws, exact_law)
    exact = {"laws": len(errors), "worst_relative_error_of_B_and_C": max(errors)}
    print(exact)
    studies = kept(parts.with_suffix(f".{version()}.studies"), options.studies, planted_study)
    found = coverage(studies)
    print(tabulate([{"interval": name, **row} for name, row in found.items()], "keys", "plain"))
    results = {
        "exact": exact,
        "intervals_of_95_percent": found,
        "without_interval": sum(study["curve"] is None for study in studies),
    }
    command = f"python -m benchmarks.law_coverage --laws {options.laws} --studies {options.studies}"
    write_results(options.output, command, results)


if __name__ == "__main__":
    main()
