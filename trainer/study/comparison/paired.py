"""Differences of two arms that ran with the same seeds: intervals, power, and data efficiency.

The seed is the unit of everything here: one seed gives one difference, one curve of loss over data
and one data efficiency, and Student's t over the seeds gives the intervals. What two arms share at
a seed (initial weights, order of the documents) cancels in the difference.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import chi2, norm, t

LEVEL = 0.95
POWER = 0.8
MOST_SEEDS = 1000  # more are no advice


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its t interval; the ends are NaN for a single seed."""

    mean: float
    low: float
    high: float
    spread: float  # sample standard deviation over the seeds; NaN for one
    seeds: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0."""
        return self.low > 0 or self.high < 0

    @property
    def detectable(self) -> float:
        """The true mean that a test at this level would have seen with 80 % power."""
        return detectable_difference(self.spread, self.seeds)

    def seeds_for(self, half_width: float) -> int | None:
        """How many seeds of this spread give an interval of that half width; None: too many."""
        return seeds_for(self.spread, half_width)


def estimate_mean(values: Sequence[float]) -> Estimate:
    """Mean and t interval of one value a seed.

    Raises:
        ValueError: there is none, or one is not finite.
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"{list(values)} must be finite and at least one")
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return Estimate(mean, math.nan, math.nan, math.nan, 1)
    spread = float(np.std(values, ddof=1))
    half = half_width_of(spread, count)
    return Estimate(mean, mean - half, mean + half, spread, count)


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Mean of ``ours - theirs``, the same seeds in the same order."""
    return estimate_mean([one - other for one, other in zip(ours, theirs, strict=True)])


def half_width_of(spread: float, seeds: int) -> float:
    """Half of the t interval of a mean of so many values."""
    return float(t.ppf((1 + LEVEL) / 2, seeds - 1)) * spread / math.sqrt(seeds)


def detectable_difference(spread: float, seeds: int) -> float:
    """The true mean whose two-sided t test at 1 - LEVEL rejects 0 with probability POWER.

    The power is that of the noncentral t distribution, as a mean over the chi distribution of what
    the sample takes for the spread. NaN for a single seed.
    """
    if seeds < 2:
        return math.nan
    freedom = seeds - 1
    critical = float(t.ppf((1 + LEVEL) / 2, freedom))
    shares = (np.arange(4096) + 0.5) / 4096
    bounds = critical * np.sqrt(chi2.ppf(shares, freedom) / freedom)  # in standard errors

    def missing_power(shift: float) -> float:
        """Power at a mean of ``shift`` standard errors, less the wanted one."""
        power = norm.sf(bounds - shift) + norm.cdf(-bounds - shift)
        return float(power.mean()) - POWER

    shift = brentq(missing_power, 0.0, 2 * critical + 2)
    return float(shift) * spread / math.sqrt(seeds)


def seeds_for(spread: float, half_width: float) -> int | None:
    """The fewest seeds whose interval is at most so wide; None: more than MOST_SEEDS."""
    seeds = np.arange(2, MOST_SEEDS + 1)
    narrow = t.ppf((1 + LEVEL) / 2, seeds - 1) * spread / np.sqrt(seeds) <= half_width
    return int(seeds[narrow.argmax()]) if narrow.any() else None


def tokens_for(loss: float, tokens: Sequence[float], losses: Sequence[float]) -> float | None:
    """Real tokens at which a curve has ``loss``, between its points and linear in log tokens.

    Args:
        loss: nats per token.
        tokens: of the points, ascending.
        losses: of the points; they must fall.

    Returns:
        None where ``loss`` is not between the losses, or they do not fall: nothing is extrapolated.
    """
    falling = all(later < earlier for earlier, later in itertools.pairwise(losses))
    if len(losses) < 2 or not falling or not losses[-1] <= loss <= losses[0]:
        return None
    return float(np.exp(np.interp(-loss, -np.array(losses), np.log(tokens))))


def data_efficiency(
    losses: Sequence[float],
    tokens: float,
    reference_tokens: Sequence[float],
    reference_losses: Sequence[Sequence[float]],
) -> Estimate | None:
    """How many times the data the reference needs for the same loss, from one curve a seed.

    Args:
        losses: of the arm, one a seed.
        tokens: unique real tokens it had.
        reference_tokens: of the sizes of the reference, ascending.
        reference_losses: of the reference at each size, one a seed, in the same order of seeds.

    Returns:
        The geometric mean over the seeds with its t interval, ``spread`` that of the logarithm;
        None where a seed's loss lies outside its curve.
    """
    found = [
        tokens_for(loss, reference_tokens, curve)
        for loss, curve in zip(losses, zip(*reference_losses, strict=True), strict=True)
    ]
    inside = [one for one in found if one is not None]
    if len(inside) < len(found) or not inside:
        return None
    factor = estimate_mean([math.log(one / tokens) for one in inside])
    mean, low, high = (math.exp(value) for value in (factor.mean, factor.low, factor.high))
    return Estimate(mean, low, high, factor.spread, factor.seeds)
