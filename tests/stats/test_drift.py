"""Tests of drift: which changes of level are found in simulated step times, and which are not."""

import numpy as np
import pytest

from lorameter.stats import drifting

STEP = np.arange(60)


def drifts(samples, *, tolerance):
    return drifting([samples], tolerance=tolerance)[0]


def share(shape, sd, draws=150, seed=61, tolerance=0.02):
    """Return the share of drifting series with this log shape and normal log noise."""
    rng = np.random.default_rng(seed)
    return np.mean([drifts(np.exp(rng.normal(shape, sd)), tolerance=tolerance) for _ in range(draws)])


@pytest.mark.parametrize("count", [20, 60, 200])
@pytest.mark.parametrize("sd", [0.003, 0.02, 0.19])
def test_flat_noise_is_no_drift(count, sd):
    """At most one of 25 series without a shift is called drifting, for any noise."""
    assert share(np.zeros(count), sd) <= 0.04


@pytest.mark.parametrize(
    "shape",
    [0.3 * (STEP >= 30), 0.3 * (STEP >= 52), 0.3 * (STEP // 10 % 2), 0.02 * STEP],
    ids=["throttled half-way", "late shift", "alternating", "steadily slower"],
)
def test_a_change_of_level_is_found(shape):
    """A falling clock, alternating levels and steadily rising times are found."""
    assert share(shape, 0.02) >= 0.95


@pytest.mark.parametrize(
    "shape",
    [np.exp(-STEP / 5), 4.0 * (STEP < 1), 0.3 * (STEP < 10), 0.3 * ((STEP >= 20) & (STEP < 30))],
    ids=["decaying", "compiling first step", "leading plateau", "passing burst"],
)
def test_a_slow_start_and_a_passing_burst_are_not_drift(shape):
    """The later level is steady and the faster one."""
    assert share(shape, 0.02) <= 0.08


@pytest.mark.parametrize("where", [1, 2, 30, 58, 59])
def test_a_single_slow_step_is_not_drift(where):
    """A single slow step is not a drift, at any position."""
    assert share(2.0 * (where == STEP), 0.02) <= 0.08


def test_the_tolerance_decides_whether_a_rise_is_drift():
    """A rise by 1.5 % is within a tolerance of 2 % but not within one of 0.5 %."""
    rise = 0.015 * (STEP >= 30)
    assert share(rise, 0.003) <= 0.04
    assert share(rise, 0.003, tolerance=0.005) >= 0.95


@pytest.mark.parametrize(
    ("samples", "tolerance", "message"),
    [
        ([], 0.02, "trial 0 has no samples"),
        ([1.0, 0.0], 0.02, r"trial 0 sample 1 is 0\.0"),
        ([1.0], -1, "tolerance is -1"),
    ],
)
def test_bad_input_is_an_error(samples, tolerance, message):
    """Bad input raises an error that names the offending value."""
    with pytest.raises(ValueError, match=message):
        drifts(samples, tolerance=tolerance)


def test_many_series_are_judged_as_each_alone():
    """The result does not depend on the lengths, the order and the levels of the other series."""
    rng = np.random.default_rng(7)
    shapes = [np.zeros(60), 0.3 * (STEP > 40), np.zeros(3), 0.01 * STEP, np.zeros(200), -0.3 * (STEP[:30] > 8)]
    series = [np.exp(rng.normal(shape, 0.02)) for _ in range(20) for shape in shapes]
    found = drifting(series, tolerance=0.02)
    assert found == [drifts(one, tolerance=0.02) for one in series]
    assert 0 < sum(found) < len(found)
    assert drifting([], tolerance=0.02) == []
