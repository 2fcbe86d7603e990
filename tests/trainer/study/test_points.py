"""Losses that chance does not explain: found among seeds, named, and left out of the noise."""

import numpy as np
import pytest
from numpy.typing import NDArray

from trainer.study.laws import OVERFITTING, POWER
from trainer.study.points import Points, leave_out_outliers
from trainer.study.scaling_laws import data_efficiency, fit_law

SIZES = np.array([50e6, 100e6, 200e6, 400e6, 800e6])
NOISE = 0.003


def measured(seeds: int, sizes: NDArray[np.float64] = SIZES) -> list[list[float]]:
    """Losses of a law with noise."""
    generator = np.random.default_rng(0)
    clean = 145 / sizes**0.235 + 1.93
    losses: list[list[float]] = (
        clean[:, None] + generator.normal(0, NOISE, (len(sizes), seeds))
    ).tolist()
    return losses


def test_a_loss_far_from_its_other_seeds_is_named_and_counts_for_nothing() -> None:
    losses = measured(3)
    spared = [*losses[:2], losses[2][:1] + losses[2][2:], *losses[3:]]
    losses[2][1] += 15 * NOISE
    fit = fit_law(POWER, Points(SIZES, losses), replicates=20)
    without = fit_law(POWER, Points(SIZES, spared), replicates=20)
    np.testing.assert_array_equal(fit.values, without.values)
    np.testing.assert_array_equal(fit.replicates, without.replicates)
    assert without.warnings == []
    (warning,) = fit.warnings
    assert f"the loss {losses[2][1]:.4f} at x = 200,000,000 is 0.04" in warning
    assert "is left out: look at that run" in warning
    efficiency = data_efficiency(fit, [float(fit.predict(np.array([300e6]))[0])], 200e6)
    assert efficiency.warnings == fit.warnings


def test_of_two_seeds_that_are_too_far_apart_both_are_left_out() -> None:
    losses = measured(2)
    losses[0][1] -= 50 * NOISE
    left, said = leave_out_outliers(POWER, Points(SIZES, losses))
    assert left.inputs[:, 0].tolist() == SIZES[1:].tolist()
    (warning,) = said
    assert "at x = 50,000,000 differ by more than chance explains, and both are left" in warning
    assert "train a third seed" in warning


def test_nothing_is_left_out_where_a_law_needs_every_point() -> None:
    losses = measured(2)[:3]
    losses[0][1] -= 500 * NOISE
    points = Points(SIZES[:3], losses)
    assert leave_out_outliers(POWER, points) == (points, [])


def test_one_seed_a_point_tells_no_loss_that_is_off_from_a_law_that_is() -> None:
    losses = measured(1)
    losses[2][0] += 50 * NOISE
    points = Points(SIZES, losses)
    assert leave_out_outliers(POWER, points) == (points, [])


def test_several_are_found_one_after_the_other_and_every_input_is_named() -> None:
    inputs = np.array([(5e6, epochs, 3e7) for epochs in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)])
    losses = measured(3, inputs[:, 1] * 1e7)
    losses[1][0] += 20 * NOISE
    losses[4][0] += 90 * NOISE
    left, said = leave_out_outliers(OVERFITTING, Points(inputs, losses))
    assert [len(seeds) for seeds in left.losses] == [3, 2, 3, 3, 2, 3]
    assert "U = 5,000,000, E = 16, N = 30,000,000" in said[0]
    assert "U = 5,000,000, E = 2, N = 30,000,000" in said[1]


@pytest.mark.parametrize(("points", "seeds"), [(3, 2), (5, 3), (8, 3)])
def test_chance_alone_is_taken_for_an_outlier_as_rarely_as_it_says(points: int, seeds: int) -> None:
    generator = np.random.default_rng(0)
    x = 2.0 ** np.arange(points)
    found = [
        leave_out_outliers(POWER, Points(x, 3 + generator.normal(0, NOISE, (points, seeds))))[1]
        for _ in range(2000)
    ]
    share = np.mean([bool(said) for said in found])
    # Of 3 points with 2 seeds none can be spared. 1 % of 2,000 with four standard errors is 0.019.
    assert share < 0.019
    assert (share > 0.003) == (points > 3)


def test_seeds_that_agree_to_the_last_digits_hold_no_outlier() -> None:
    losses = [[value, value] for value in measured(1)[0] + [2.0, 1.9, 1.8, 1.7]]
    losses[0][1] = np.nextafter(losses[0][1], 9)
    x = 2.0 ** np.arange(len(losses))
    assert leave_out_outliers(POWER, Points(x, losses))[1] == []


def test_a_recipe_whose_seeds_differ_by_far_more_has_an_interval_of_its_own() -> None:
    fit = fit_law(POWER, Points(SIZES, measured(3)), replicates=60)
    loss = float(fit.predict(np.array([1.5 * 200e6]))[0])
    usual = data_efficiency(fit, [loss - NOISE, loss, loss + NOISE], 200e6)
    assert usual.warnings == []
    apart = data_efficiency(fit, [loss - NOISE, loss, loss + 20 * NOISE], 200e6)
    assert apart.interval.low < 1.5 < apart.interval.high
    assert apart.interval.high - apart.interval.low > 5 * (usual.interval.high - usual.interval.low)
    (warning,) = apart.warnings
    assert warning.startswith("its seeds differ by 0.03")
    assert "rests on its seeds alone: look at these runs" in warning
