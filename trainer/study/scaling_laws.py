"""Scaling laws: robust fits with bootstrap intervals, and the choice among laws by held-out error.

Every law (``trainer/study/laws.py``) is linear in its coefficients once its shape is fixed.
Starts come from non-negative
least squares over a grid of shapes (variable projection, Golub and Pereyra 1973); the best of them
are refined on the logarithms of all parameters with a Huber loss on log-residuals (Hoffmann et al.
2203.15556, appendix D.2). Trust-region least squares sums the residuals, so it does not stop early
as a mean of tiny Huber terms does (Besiroglu et al. 2404.10102).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

from trainer.study.laws import POWER, Law
from trainer.study.points import (
    EXACT,
    Noise,
    Points,
    estimate_noise,
    leave_out_outliers,
    noise_of,
)

HUBER_DELTA = 1e-3  # of log-residuals, as in Hoffmann et al.
STARTS = 3  # of the grid, refined in full
STEP = 1e-7  # of the logarithm of a shape, in forward differences
TOLERANCE = 1e-13  # relative; scipy's 1e-8 stops where residuals are 1e-8 and A, B, C still far off
REPLICATES = 200
LEVEL = 0.95
SMALLEST = 1e-12  # stands for a coefficient of 0, which has no logarithm


@dataclass(frozen=True)
class Interval:
    """Percentile interval; NaN where nothing says how large the noise is."""

    low: float
    high: float
    level: float = LEVEL

    def __str__(self) -> str:
        return f"{self.level:.0%} interval {self.low:.4g} to {self.high:.4g}"


@dataclass(frozen=True)
class Fit:
    """A fitted law with its bootstrap replicates."""

    law: Law
    points: Points
    values: NDArray[np.float64]  # [p]
    replicates: NDArray[np.float64]  # [r, p]; r = 0 where nothing says how large the noise is
    noise: Noise | None
    warnings: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> dict[str, float]:
        return dict(zip(self.law.parameters, self.values.tolist(), strict=True))

    def interval(self, name: str) -> Interval:
        """Of one parameter."""
        return percentiles(self.replicates[:, self.law.parameters.index(name)])

    def predict(self, inputs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Losses ``[n]`` at ``inputs`` (``[n]`` or ``[n, k]``)."""
        inputs = np.asarray(inputs, dtype=np.float64)
        return self.law.predict(self.values, inputs[:, None] if inputs.ndim == 1 else inputs)

    def predict_interval(
        self, inputs: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lower and upper ends ``[n]`` of the curve itself (not of a new measurement)."""
        inputs = np.asarray(inputs, dtype=np.float64)
        inputs = inputs[:, None] if inputs.ndim == 1 else inputs
        if not len(self.replicates):
            return np.full((2, len(inputs)), math.nan)  # type: ignore[return-value]
        curves = np.stack([self.law.predict(values, inputs) for values in self.replicates])
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(curves, (tail, 1 - tail), axis=0)
        return low, high

    def residual(self) -> float:
        """Root mean square of measured minus fitted, nats."""
        inputs, losses = self.points.rows
        return float(np.sqrt(np.mean((losses - self.law.predict(self.values, inputs)) ** 2)))


def percentiles(samples: NDArray[np.float64]) -> Interval:
    """Percentile interval of bootstrap samples; infinities count as the ends they are."""
    if not len(samples):
        return Interval(math.nan, math.nan)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(samples, (tail, 1 - tail), method="nearest")
    return Interval(float(low), float(high))


def fit_law(law: Law, points: Points, *, replicates: int = REPLICATES, seed: int = 0) -> Fit:
    """Fit ``law`` to ``points``, with a bootstrap over seeds, or over points where one seed ran.

    With several seeds the noise is their spread around each point's mean, pooled over the points;
    with one seed it is the distance of the points from the law. Either is resampled, added to the
    fitted curve at every measured place, and refitted. A loss far from the other seeds of its point
    is left out of both, and named in the warnings.

    Raises:
        ValueError: fewer distinct points than parameters, or points with as many columns as the
            law does not read.
    """
    if points.inputs.shape[1] != len(law.inputs):
        raise ValueError(
            f"the {law.name} reads {law.inputs}, the points have {points.inputs.shape[1]} columns"
        )
    if points.distinct() < len(law.parameters):
        raise ValueError(
            f"{points.distinct()} distinct points cannot determine the {len(law.parameters)} "
            f"parameters of the {law.name} ({law.formula}); measure at least "
            f"{len(law.parameters)}, better {len(law.parameters) + 2}"
        )
    points, warnings = leave_out_outliers(law, points)
    inputs, losses = points.rows
    starts = grid_starts(law, inputs, losses)[:STARTS]
    starts.append(least_squares_start(law, inputs, losses, starts[0]))
    values = refine(law, inputs, losses, starts)
    fitted = law.predict(values, inputs)
    noise = estimate_noise(law, points, losses - fitted)
    samples = np.empty((0, len(values)))
    if noise is None:
        warnings.append(
            f"no interval: {len(losses)} losses of one seed each leave nothing over after "
            f"{len(values)} parameters; add seeds or points"
        )
    elif replicates:
        generator = np.random.default_rng(seed)
        drawn = np.maximum(fitted + noise.draw(generator, len(fitted), replicates), 1e-3)
        samples = np.stack([refine(law, inputs, row, [values]) for row in drawn])
        if points.distinct() == len(law.parameters):
            warnings.append(
                f"{points.distinct()} points determine the {len(law.parameters)} parameters "
                "exactly: the interval holds the noise of the seeds, nothing tests the law itself"
            )
    if noise is not None and noise.source == "seeds":
        spread = float(np.sqrt(np.mean(noise.residuals**2)))
        missed = float(np.sqrt(np.mean((losses - fitted) ** 2)))
        if missed > max(3 * spread, EXACT * float(losses.mean())):
            warnings.append(
                f"the {law.name} misses the points by {missed:.4f} nats where seeds differ by "
                f"{spread:.4f}: it is the wrong law, and its intervals are too narrow"
            )
    if law is POWER and rises(points):
        warnings.append(
            f"the losses do not fall as {law.inputs[0]} grows, which {law.formula} cannot follow: "
            "tune the larger ones, their settings may not be the best"
        )
    return Fit(law, points, values, samples, noise, warnings)


def rises(points: Points) -> bool:
    """Whether losses rise with the first input, or stay as they are."""
    inputs, losses = points.rows
    x = np.log(inputs[:, 0])
    return float((x - x.mean()) @ (losses - losses.mean())) >= 0


def grid_starts(
    law: Law, inputs: NDArray[np.float64], losses: NDArray[np.float64]
) -> list[NDArray[np.float64]]:
    """Parameters ``[p]`` on the grid of shapes, the best first."""
    found = []
    for shape in itertools.product(*law.grid):
        coefficients, missed = project(law, np.array(shape), inputs, losses)
        found.append((missed @ missed, np.concatenate((coefficients, shape))))
    found.sort(key=lambda pair: pair[0])
    return [np.maximum(values, SMALLEST) for _, values in found]


def project(
    law: Law, shape: NDArray[np.float64], inputs: NDArray[np.float64], losses: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The best coefficients ``[c]`` for a shape and the relative residuals ``[m]`` they leave."""
    basis = law.basis(shape, inputs) / losses[:, None]
    largest = basis.max(axis=0)
    largest[largest == 0] = 1.0  # no repeats measured: the penalty's column is empty
    scaled, _ = nnls(basis / largest, np.ones_like(losses))
    return scaled / largest, basis @ (scaled / largest) - 1


def least_squares_start(
    law: Law, inputs: NDArray[np.float64], losses: NDArray[np.float64], start: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The least-squares optimum ``[p]`` near ``start``, exact where the points lie on the law.

    Only the shape is searched, the coefficients follow from it: without the valley in which A, B
    and C exchange, the search ends at the law itself and not near it.
    """
    count = len(law.coefficients)
    lowest, highest = (ends[count:] for ends in bounds(law))
    result = least_squares(
        lambda logarithms: project(law, np.exp(logarithms), inputs, losses)[1],
        x0=np.clip(np.log(start[count:]), lowest, highest),
        bounds=(lowest, highest),
        ftol=TOLERANCE,
        xtol=TOLERANCE,
        gtol=TOLERANCE,
        max_nfev=200,
    )
    shape = np.exp(result.x)
    coefficients, _ = project(law, shape, inputs, losses)
    values: NDArray[np.float64] = np.maximum(np.concatenate((coefficients, shape)), SMALLEST)
    return values


def bounds(law: Law) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least and greatest logarithms ``[p]``: shapes stay near their grid, so no power overflows."""
    linear = len(law.coefficients)
    lowest = [SMALLEST / 2] * linear + [min(grid) / 20 for grid in law.grid]
    highest = [1e30] * linear + [max(grid) * 10 for grid in law.grid]
    return np.log(lowest), np.log(highest)


def refine(
    law: Law,
    inputs: NDArray[np.float64],
    losses: NDArray[np.float64],
    starts: Sequence[NDArray[np.float64]],
) -> NDArray[np.float64]:
    """The best local optimum from ``starts``: parameters ``[p]``.

    The tolerances stay tight for bootstrap replicates too: along the flat valley of A, B and C an
    early stop halves the intervals.
    """

    def residuals(logarithms: NDArray[np.float64]) -> NDArray[np.float64]:
        predicted = law.predict(np.exp(logarithms), inputs)
        missed: NDArray[np.float64] = np.log(np.maximum(predicted, SMALLEST)) - target
        return missed

    def jacobian(logarithms: NDArray[np.float64]) -> NDArray[np.float64]:
        """Exact in the coefficients, forward differences in the few shapes: ``[m, p]``."""
        values = np.exp(logarithms)
        basis = law.basis(values[linear:], inputs)
        predicted = np.maximum(basis @ values[:linear], SMALLEST)
        columns = list((basis * values[:linear]).T)
        for place in range(linear, len(values)):
            moved = values.copy()
            moved[place] *= math.exp(STEP)
            columns.append((law.predict(moved, inputs) - predicted) / STEP)
        slopes: NDArray[np.float64] = np.stack(columns, axis=1) / predicted[:, None]
        return slopes

    target = np.log(losses)
    linear = len(law.coefficients)
    lowest, highest = bounds(law)
    results = [
        least_squares(
            residuals,
            jac=jacobian,
            x0=np.clip(np.log(start), lowest, highest),
            bounds=(lowest, highest),
            loss="huber",
            f_scale=HUBER_DELTA,
            x_scale="jac",
            ftol=TOLERANCE,
            xtol=TOLERANCE,
            gtol=TOLERANCE,
            max_nfev=200,
        )
        for start in starts
    ]
    logarithms: NDArray[np.float64] = min(results, key=lambda result: result.cost).x
    return np.exp(logarithms)


@dataclass(frozen=True)
class Candidate:
    """How well a law foresaw points it was not fitted to."""

    law: Law
    error: float  # root mean square of log-residuals on the points left out
    fit: Fit | None
    reason: str = ""  # why it could not be tried


def choose_law(
    laws: Sequence[Law], points: Points, *, replicates: int = REPLICATES, seed: int = 0
) -> list[Candidate]:
    """All laws, the one with the least held-out error first.

    Each point is left out once, the law is fitted to the others and foretells it. Laws with more
    parameters than the remaining points are listed last with the reason; only the best law's fit
    has intervals.

    Raises:
        ValueError: no law can be tried.
    """
    tried, refused = [], []
    for law in laws:
        if points.distinct() - 1 < len(law.parameters):
            reason = (
                f"{points.distinct()} points, one left out, cannot determine "
                f"{len(law.parameters)} parameters"
            )
            refused.append(Candidate(law, math.inf, None, reason))
            continue
        missed = []
        everything = fit_law(law, points, replicates=0)
        for index, seeds in enumerate(points.losses):
            inputs, losses = points.without(index).rows
            # From the fit to all points as well: one point moves the optimum only a little.
            starts = [everything.values, *grid_starts(law, inputs, losses)[:1]]
            values = refine(law, inputs, losses, starts)
            foretold = float(law.predict(values, points.inputs[index : index + 1])[0])
            missed.append((math.log(foretold) - math.log(float(np.mean(seeds)))) ** 2)
        tried.append(Candidate(law, math.sqrt(float(np.mean(missed))), everything))
    if not tried:
        raise ValueError(
            f"{points.distinct()} points are too few to choose among "
            f"{', '.join(law.name for law in laws)}: {refused[0].reason}"
        )
    tried.sort(key=lambda candidate: candidate.error)
    best = fit_law(tried[0].law, points, replicates=replicates, seed=seed)
    return [Candidate(tried[0].law, tried[0].error, best), *tried[1:], *refused]


@dataclass(frozen=True)
class DataEfficiency:
    """How many times more real data the real-only recipe needs for the same loss."""

    factor: float  # infinite where the loss lies below the law's asymptote
    interval: Interval
    equivalent_tokens: float
    reference: str  # what counts as 1.0
    warnings: list[str] = field(default_factory=list)


def invert_power_law(
    parameters: NDArray[np.float64], loss: float | NDArray[np.float64]
) -> NDArray[np.float64]:
    """``x`` at which ``A / x^B + C`` is ``loss``; infinite at and below C.

    Args:
        parameters: ``[..., 3]`` in the order of :data:`POWER`: A, C, B.
        loss: nats per token, broadcast against the leading axes.
    """
    amplitude, asymptote, exponent = np.moveaxis(np.asarray(parameters), -1, 0)
    above = np.asarray(loss, dtype=np.float64) - asymptote
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        x = (amplitude / above) ** (1 / exponent)
    return np.where(above > 0, x, math.inf)


def data_efficiency(
    fit: Fit, losses: Sequence[float], reference_tokens: float, *, seed: int = 0
) -> DataEfficiency:
    """Invert the real-only data law at the loss of another recipe.

    Args:
        fit: :data:`POWER` over unique real tokens, fitted to the best real-only runs.
        losses: of the recipe, one a seed, nats per token.
        reference_tokens: unique real tokens the recipe had.

    Raises:
        ValueError: the fit is of another law, or a loss is not finite.
    """
    if fit.law is not POWER:
        raise ValueError(f"data efficiency inverts the {POWER.name}, not the {fit.law.name}")
    if not losses or not all(math.isfinite(loss) for loss in losses):
        raise ValueError(f"losses {list(losses)} must be finite and at least one")
    loss = float(np.mean(losses))
    equivalent = float(invert_power_law(fit.values, loss))
    amplitude, asymptote, exponent = fit.values
    samples = np.empty(0)
    warnings = list(fit.warnings)
    if fit.noise is not None and len(fit.replicates):
        generator = np.random.default_rng(seed)
        own = noise_of(losses, fit.noise)
        if own is not fit.noise:
            warnings.append(
                f"its seeds differ by {np.std(losses, ddof=1):.4f} nats where those of the law "
                f"differ by {np.sqrt(np.mean(fit.noise.residuals**2)):.4f}, so the interval rests "
                "on its seeds alone: look at these runs"
            )
        noise = own.draw(generator, len(losses), len(fit.replicates)).mean(axis=1)
        samples = invert_power_law(fit.replicates, loss + noise) / reference_tokens
    measured = fit.points.inputs[:, 0]
    if math.isinf(equivalent):
        warnings.append(
            f"the loss {loss:.4f} is not above the law's asymptote {asymptote:.4f}: no amount of "
            "real data reaches it by this law"
        )
    elif not measured.min() <= equivalent <= measured.max():
        warnings.append(
            f"extrapolated: {equivalent:,.0f} tokens lie outside the measured "
            f"{measured.min():,.0f} to {measured.max():,.0f}"
        )
    reference = (
        f"real-only law {amplitude:.4g} / D^{exponent:.3f} + {asymptote:.4f} at "
        f"{reference_tokens:,.0f} real tokens"
    )
    return DataEfficiency(
        equivalent / reference_tokens, percentiles(samples), equivalent, reference, warnings
    )
