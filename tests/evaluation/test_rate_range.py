"""The range test, on losses whose best and worst rates are known."""

import math
from itertools import pairwise

import pytest

from gptpl.evaluation.loss_curves import Divergence, ramp_rate, range_result

STEPS = 100


def ramp(min_lr: float, max_lr: float) -> list[float]:
    return [ramp_rate(step, min_lr=min_lr, max_lr=max_lr, steps=STEPS) for step in range(STEPS)]


def descent(rates: list[float], *, curvature: float) -> list[float]:
    """Losses of gradient descent on curvature / 2 x^2, which diverges for rates above 2 / curvature."""
    x, losses = 1.0, []
    for rate in rates:
        losses.append(1.0 + curvature / 2 * x * x)
        x -= rate * curvature * x
    return losses


def test_the_ramp_goes_from_end_to_end_by_equal_factors():
    rates = ramp(1e-4, 1.0)
    assert (rates[0], rates[-1]) == pytest.approx((1e-4, 1.0))
    factors = [b / a for a, b in pairwise(rates)]
    assert max(factors) == pytest.approx(min(factors))


@pytest.mark.parametrize("curvature", [0.5, 10.0, 300.0])
def test_a_parabola_diverges_beyond_its_known_rate_and_is_suggested_less(curvature):
    bound = 2 / curvature
    rates = ramp(1e-4 * bound, 100 * bound)
    result = range_result(rates, descent(rates, curvature=curvature), steps=STEPS)
    assert result.suggested is not None
    assert result.diverges is not None
    # By then the parabola is nearly at its bottom, and has to grow up again: some steps beyond the bound.
    assert bound < result.diverges < 20 * bound
    assert 0.005 * bound < result.suggested < bound


def test_noise_on_a_flat_loss_does_not_diverge():
    losses = [3.0 + 0.2 * math.sin(7 * i) for i in range(STEPS)]
    assert range_result(ramp(1e-6, 1.0), losses, steps=STEPS).diverges is None


def test_a_loss_that_only_rises_suggests_nothing():
    losses = [3.0 + 0.001 * i for i in range(STEPS)]
    assert range_result(ramp(1e-6, 1.0), losses, steps=STEPS).suggested is None


def test_the_steepest_place_of_a_curve_is_found():
    """A step down from 5 to 3 about the 60th of 100 rates."""
    rates = ramp(1e-6, 1.0)
    losses = [4 - math.tanh((i - 60) / 5) for i in range(STEPS)]
    assert range_result(rates, losses, steps=STEPS).suggested == pytest.approx(rates[60], rel=0.2)


def test_no_number_ends_it():
    losses = [3.0, 2.9, 2.8, math.nan]
    result = range_result([1e-3, 1e-2, 1e-1, 1.0], losses, steps=10)
    assert result.diverges == 1.0
    assert result.suggested is not None
    assert math.isnan(result.smoothed[3])
    assert [Divergence().after(loss) for loss in (math.inf, math.nan)] == [True, True]


@pytest.mark.parametrize("losses", [[], [3.0], [math.nan], [3.0, 2.0]])
def test_a_ramp_of_hardly_any_steps_suggests_nothing(losses):
    assert range_result([1e-3, 1e-2][: len(losses)], losses, steps=10).suggested is None
