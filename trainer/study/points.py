"""Measured losses, and what chance alone does to them: the noise, and losses far outside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from trainer.study.laws import Law

OUTLIER_LEVEL = 0.01  # probability of taking a loss for an outlier where there is none
EXACT = 1e-9  # relative differences below which losses are equal, and points lie on a law


@dataclass(frozen=True)
class Points:
    """Measured losses: ``inputs [n, k]``, and for each point one loss a seed, nats per token.

    Raises:
        ValueError: a loss or an input is not finite and positive, or a point has no loss.
    """

    inputs: NDArray[np.float64]
    losses: Sequence[Sequence[float]] | NDArray[np.float64]

    def __post_init__(self) -> None:
        inputs = np.asarray(self.inputs, dtype=np.float64)
        object.__setattr__(self, "inputs", inputs[:, None] if inputs.ndim == 1 else inputs)
        if len(self.inputs) != len(self.losses) or not all(len(seeds) for seeds in self.losses):
            raise ValueError(
                f"{len(self.inputs)} points with losses of {[len(s) for s in self.losses]} seeds; "
                "every point needs at least one loss"
            )
        for values, seeds in zip(self.inputs, self.losses, strict=True):
            for value in (*values, *seeds):
                if not (math.isfinite(value) and value > 0):
                    raise ValueError(
                        f"the point {values.tolist()} with losses {list(seeds)} holds {value}; a "
                        "law is fitted to finite numbers above 0: leave that run out or redo it"
                    )

    @property
    def rows(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """One row a seed: inputs ``[m, k]`` and losses ``[m]``."""
        counts = [len(seeds) for seeds in self.losses]
        return np.repeat(self.inputs, counts, axis=0), np.concatenate(
            [np.asarray(seeds, dtype=np.float64) for seeds in self.losses]
        )

    def distinct(self) -> int:
        return len(np.unique(self.inputs, axis=0))

    def without(self, index: int) -> Points:
        keep = [place for place in range(len(self.losses)) if place != index]
        return Points(self.inputs[keep], [self.losses[place] for place in keep])


@dataclass(frozen=True)
class Noise:
    """Residuals to draw from, in nats, and the degrees of freedom they rest on."""

    residuals: NDArray[np.float64]  # [m], scaled to be unbiased
    freedom: int
    source: str  # seeds, points or recipe

    def draw(
        self, generator: np.random.Generator, rows: int, replicates: int
    ) -> NDArray[np.float64]:
        """``[replicates, rows]``.

        Every replicate is widened by ``sqrt(f / chi2_f)``: few residuals do not know their own
        spread well, and without it intervals from three seeds would be far too narrow (this is
        what turns a normal interval into Student's).
        """
        chosen = generator.choice(self.residuals, (replicates, rows))
        widen = np.sqrt(self.freedom / generator.chisquare(self.freedom, (replicates, 1)))
        drawn: NDArray[np.float64] = chosen * widen
        return drawn


def estimate_noise(law: Law, points: Points, residuals: NDArray[np.float64]) -> Noise | None:
    """Pooled spread of the seeds; of the points around the law where there is one seed each."""
    several = [np.asarray(seeds) for seeds in points.losses if len(seeds) > 1]
    if several:
        scaled = [
            (seeds - seeds.mean()) * math.sqrt(len(seeds) / (len(seeds) - 1)) for seeds in several
        ]
        freedom = sum(len(seeds) - 1 for seeds in several)
        return Noise(np.concatenate(scaled), freedom, "seeds")
    freedom = len(residuals) - len(law.parameters)
    if freedom < 1:
        return None
    return Noise(residuals * math.sqrt(len(residuals) / freedom), freedom, "points")


def leave_out_outliers(law: Law, points: Points) -> tuple[Points, list[str]]:
    """The points without losses far from the other seeds of their point, and what was left out.

    A run that went wrong says nothing of what chance does to the others: in the noise it would make
    every interval several times too wide. A loss is compared with its point's other seeds, whatever
    the law: deletion residuals are Student's where there is no outlier (Beckman and Cook 1983), at
    :data:`OUTLIER_LEVEL` for all losses together. With one seed a point nothing tells a loss that
    is off from a law that is, and all stay. Of two seeds nothing tells which is off, so both go,
    unless too few points would be left for the law.
    """
    said = []
    while (found := farthest(points)) is not None:
        place, seed = found
        losses = list(points.losses[place])
        where = ", ".join(
            f"{name} = {value:,.10g}"
            for name, value in zip(law.inputs, points.inputs[place], strict=True)
        )
        if len(losses) > 2:
            off = losses.pop(seed)
            text = (
                f"the loss {off:.4f} at {where} is {abs(off - np.mean(losses)):.4f} nats from the "
                "mean of its other seeds, which chance does not explain, and is left out: look at "
                "that run"
            )
            rest = [*points.losses[:place], losses, *points.losses[place + 1 :]]
            points = Points(points.inputs, rest)
        else:
            fewer = points.without(place)
            if fewer.distinct() < len(law.parameters):
                break
            points = fewer
            text = (
                f"the losses {losses[0]:.4f} and {losses[1]:.4f} at {where} differ by more than "
                "chance explains, and both are left out: look at these runs, or train a third seed"
            )
        said.append(text)
    return points, said


def farthest(points: Points) -> tuple[int, int] | None:
    """The outlier that stands out most: its point and seed; None where there is none."""
    seeds = [np.asarray(losses, dtype=np.float64) for losses in points.losses]
    freedom = sum(len(losses) - 1 for losses in seeds)
    several = [place for place, losses in enumerate(seeds) if len(losses) > 1]
    if freedom < 2:
        return None
    squares = sum(float(((losses - losses.mean()) ** 2).sum()) for losses in seeds)
    # What the sum of squares loses with each loss.
    gains = [
        (float(gain), place, seed)
        for place in several
        for seed, gain in enumerate(
            (seeds[place] - seeds[place].mean()) ** 2 * len(seeds[place]) / (len(seeds[place]) - 1)
        )
    ]
    gain, place, seed = max(gains)
    if gain <= (EXACT * float(seeds[place].mean())) ** 2:
        return None
    tests = sum(len(seeds[one]) if len(seeds[one]) > 2 else 1 for one in several)
    rest = max(squares - gain, 0.0) / (freedom - 1)
    deviation = math.sqrt(gain / rest) if rest else math.inf
    chance = 2 * float(stats.t.sf(deviation, freedom - 1))
    return (place, seed) if chance * tests < OUTLIER_LEVEL else None


def noise_of(losses: Sequence[float], noise: Noise) -> Noise:
    """The noise of a recipe's losses: that of the law, unless they differ by plainly more."""
    values = np.asarray(losses, dtype=np.float64)
    freedom = len(values) - 1
    if not freedom:
        return noise
    residuals = (values - values.mean()) * math.sqrt(len(values) / freedom)
    own, expected = float(np.mean(residuals**2)), float(np.mean(noise.residuals**2))
    ratio = own / expected if expected else math.inf
    if own <= (EXACT * float(values.mean())) ** 2:
        return noise
    if float(stats.f.sf(ratio, freedom, noise.freedom)) >= OUTLIER_LEVEL:
        return noise
    return Noise(residuals, freedom, "recipe")
