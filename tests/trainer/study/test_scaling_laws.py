"""Fits: planted laws come back, intervals cover, the right law is chosen, bad input is refused."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from trainer.study.laws import (
    EFFECTIVE_DATA,
    OVERFITTING,
    OVERFITTING_FREE,
    POWER,
    REPEATED_DATA,
    Law,
)
from trainer.study.points import Points
from trainer.study.scaling_laws import (
    choose_law,
    data_efficiency,
    fit_law,
    invert_power_law,
)

SIZES = np.array([50e6, 100e6, 200e6, 400e6, 800e6, 1.6e9])
# Near the companion paper's real-only law: 3.5544 at 203.9M tokens.
PLANTED = {"A": (3.5544 - 1.93) * 203.9e6**0.235, "C": 1.93, "B": 0.235}


def planted_losses(
    x: NDArray[np.float64], noise: float, seeds: int, seed: int
) -> list[list[float]]:
    generator = np.random.default_rng(seed)
    clean = PLANTED["A"] / x ** PLANTED["B"] + PLANTED["C"]
    losses: list[list[float]] = (
        clean[:, None] + generator.normal(0, noise, (len(x), seeds))
    ).tolist()
    return losses


@settings(max_examples=25)
@given(
    asymptote=st.floats(0.5, 3.5),
    exponent=st.floats(0.1, 1.5),
    share=st.floats(0.05, 2.0),
    scale=st.floats(1.0, 1e9),
)
@example(asymptote=0.75, exponent=1.40625, share=1.0625, scale=8607560.0)
@example(asymptote=0.75, exponent=1.40625, share=1.125, scale=7544176.0)
def test_an_exact_power_law_comes_back(
    asymptote: float, exponent: float, share: float, scale: float
) -> None:
    x = scale * np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    amplitude = share * scale**exponent
    fit = fit_law(POWER, Points(x, (amplitude / x**exponent + asymptote)[:, None]), replicates=0)
    assert fit.parameters["C"] == pytest.approx(asymptote, rel=1e-6)
    assert fit.parameters["B"] == pytest.approx(exponent, rel=1e-6)
    np.testing.assert_allclose(fit.predict(x), amplitude / x**exponent + asymptote, rtol=1e-9)
    assert invert_power_law(fit.values, float(fit.predict(x[1:2])[0])) == pytest.approx(x[1], 1e-6)


@pytest.mark.parametrize(
    ("law", "values"),
    [
        (EFFECTIVE_DATA, [60.0, 2.0, 0.2, 12.0]),
        (OVERFITTING, [60.0, 2.0, 0.002, 0.2]),
        (OVERFITTING_FREE, [60.0, 2.0, 0.02, 0.2, 0.6, 0.4]),
    ],
)
def test_exact_laws_of_repeated_data_come_back(law: Law, values: list[float]) -> None:
    inputs = grid_of_runs()
    exact = law.predict(np.array(values), inputs)
    fit = fit_law(law, Points(inputs, exact[:, None]), replicates=0)
    np.testing.assert_allclose(fit.values, values, rtol=1e-6)


@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_cover_the_planted_parameters(seeds: int) -> None:
    covered = dict.fromkeys(PLANTED, 0)
    efficiency, studies = 0, 8
    for study in range(studies):
        points = Points(SIZES, planted_losses(SIZES, 0.003, seeds, study))
        fit = fit_law(POWER, points, replicates=60, seed=study)
        for name, value in PLANTED.items():
            interval = fit.interval(name)
            covered[name] += interval.low <= value <= interval.high
        recipe = planted_losses(np.array([1.8 * 200e6]), 0.003, seeds, 100 + study)[0]
        answer = data_efficiency(fit, recipe, 200e6, seed=study)
        efficiency += answer.interval.low <= 1.8 <= answer.interval.high
        assert answer.factor == pytest.approx(1.8, rel=0.1)
    # A 95 % interval misses 4 or more of 8 with probability 0.0004.
    assert min(*covered.values(), efficiency) >= studies - 3


def test_an_outlier_does_not_move_the_fit() -> None:
    losses = planted_losses(SIZES, 0.0, 1, 0)
    losses[2][0] += 0.3
    fit = fit_law(POWER, Points(SIZES, losses), replicates=0)
    others = [0, 1, 3, 4, 5]
    expected = np.array(losses)[others, 0]
    np.testing.assert_allclose(fit.predict(SIZES[others]), expected, atol=0.01)


def grid_of_runs() -> NDArray[np.float64]:
    """Unique tokens, epochs, parameters."""
    return np.array(
        [
            (u, e, n)
            for u in (5e6, 20e6, 80e6)
            for e in (1.0, 4.0, 16.0, 64.0)
            for n in (30e6, 120e6)
            if (u, n) != (80e6, 30e6)
        ]
    )


@pytest.mark.parametrize(
    ("law", "values"),
    [
        (EFFECTIVE_DATA, [60.0, 2.0, 0.2, 12.0]),
        (OVERFITTING, [60.0, 2.0, 0.002, 0.2]),
        (OVERFITTING_FREE, [60.0, 2.0, 0.02, 0.2, 0.6, 0.4]),
    ],
)
def test_the_law_that_made_the_losses_foretells_them_best(law, values) -> None:  # type: ignore[no-untyped-def]
    inputs = grid_of_runs()
    clean = law.predict(np.array(values), inputs)
    noisy = clean + np.random.default_rng(0).normal(0, 0.004, len(clean))
    candidates = choose_law(REPEATED_DATA, Points(inputs, noisy[:, None]), replicates=30)
    assert candidates[0].law is law
    assert candidates[0].error < 0.5 * max(candidate.error for candidate in candidates)
    fit = candidates[0].fit
    assert fit is not None
    for name, value in zip(law.parameters, values, strict=True):
        interval = fit.interval(name)
        assert interval.low * 0.9 <= value <= interval.high * 1.1


def test_laws_with_too_many_parameters_say_why_they_were_not_tried() -> None:
    inputs = grid_of_runs()[:5]
    points = Points(inputs, EFFECTIVE_DATA.predict(np.array([60, 2, 0.2, 12]), inputs)[:, None])
    candidates = choose_law(REPEATED_DATA, points, replicates=0)
    assert candidates[-1].law is OVERFITTING_FREE
    assert candidates[-1].fit is None
    assert "cannot determine 6 parameters" in candidates[-1].reason
    with pytest.raises(ValueError, match="too few to choose"):
        choose_law(REPEATED_DATA, Points(inputs[:3], [[3.0], [2.9], [2.8]]))


def test_answers_beyond_the_measured_sizes_are_marked() -> None:
    fit = fit_law(POWER, Points(SIZES, planted_losses(SIZES, 0.002, 2, 0)), replicates=60)
    inside = data_efficiency(fit, [float(fit.predict(np.array([300e6]))[0])], 200e6)
    assert inside.factor == pytest.approx(1.5, rel=1e-3)
    assert inside.warnings == []
    assert "200,000,000 real tokens" in inside.reference
    beyond = data_efficiency(fit, [float(fit.predict(np.array([5e9]))[0])], 200e6)
    assert "extrapolated" in beyond.warnings[0]
    below = data_efficiency(fit, [fit.parameters["C"] - 0.01], 200e6)
    assert math.isinf(below.factor)
    assert "not above the law's asymptote" in below.warnings[0]


def test_the_papers_own_constants_give_its_headline() -> None:
    """1.48x and 1.80x follow from 3.5544 at 203.9M tokens with the companion's exponent."""
    values = np.array([PLANTED["A"], PLANTED["C"], PLANTED["B"]])
    assert invert_power_law(values, 3.4097) / 203.9e6 == pytest.approx(1.49, abs=0.01)
    assert invert_power_law(values, 3.344) / 203.9e6 == pytest.approx(1.80, abs=0.02)


def test_a_wrong_law_is_noticed() -> None:
    x = np.array([1.0, 2, 3, 4, 5, 6])
    wave = 3 + 0.2 * np.sin(2 * x)
    fit = fit_law(POWER, Points(x, [[y, y + 0.001, y - 0.001] for y in wave]), replicates=0)
    assert "it is the wrong law" in fit.warnings[0]


def test_losses_that_rise_with_the_data_are_said() -> None:
    x = np.array([1.0, 2.0, 4.0, 8.0])
    fit = fit_law(POWER, Points(x, [[3.0], [3.1], [3.15], [3.2]]), replicates=0)
    assert any("the losses do not fall as x grows" in warning for warning in fit.warnings)


def test_exact_points_with_seeds_that_agree_are_no_wrong_law() -> None:
    x = np.array([1.0, 2.0, 4.0, 8.0])
    losses = [[2 + value, 2 + value] for value in x**-0.5]
    assert fit_law(POWER, Points(x, losses), replicates=5).warnings == []


@pytest.mark.parametrize(
    ("x", "losses", "message"),
    [
        ([1.0, 2.0], [[3.0], [2.9]], "2 distinct points cannot determine the 3 parameters"),
        ([1.0, 1.0, 2.0], [[3.0], [3.0], [2.9]], "2 distinct points"),
        ([1.0, 2.0, 3.0], [[3.0], [math.nan], [2.8]], "holds nan"),
        ([1.0, 2.0, 3.0], [[3.0], [math.inf], [2.8]], "holds inf"),
        ([0.0, 2.0, 3.0], [[3.0], [2.9], [2.8]], r"holds 0\.0"),
        ([1.0, 2.0, 3.0], [[3.0], [], [2.8]], "at least one loss"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    x: list[float], losses: list[list[float]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit_law(POWER, Points(np.array(x), losses))


def test_three_points_of_one_seed_have_no_interval() -> None:
    fit = fit_law(POWER, Points(np.array([1.0, 2, 4]), [[3.0], [2.5], [2.25]]))
    assert fit.parameters["C"] == pytest.approx(2.0, abs=1e-3)
    assert math.isnan(fit.interval("C").low)
    assert "no interval" in fit.warnings[0]
    seeds = [[3.0, 3.01], [2.5, 2.51], [2.25, 2.26]]
    fit = fit_law(POWER, Points(np.array([1.0, 2, 4]), seeds), replicates=20)
    assert fit.interval("C").low < fit.interval("C").high
    assert "nothing tests the law itself" in fit.warnings[0]


def test_only_the_power_law_is_inverted() -> None:
    inputs = grid_of_runs()
    losses = EFFECTIVE_DATA.predict(np.array([60, 2, 0.2, 12]), inputs)[:, None]
    fit = fit_law(EFFECTIVE_DATA, Points(inputs, losses), replicates=0)
    with pytest.raises(ValueError, match="inverts the power law"):
        data_efficiency(fit, [3.0], 1e6)
    with pytest.raises(ValueError, match="reads"):
        fit_law(POWER, Points(inputs, losses))
