"""Tests of estimate_trials: coverage by simulation, the linear fallback, and edge cases."""

import math

import numpy as np
import pytest
from scipy import stats

from lorameter.stats import estimate_trials

LARGEST = 1.7976931348623157e308


def test_interval_covers_the_true_value():
    """The 95 % interval over 4 replicates covers the true geometric centre in 94 to 96 % of runs."""
    rng = np.random.default_rng(41)
    runs = np.exp(rng.normal(math.log(0.44), 0.1, (3000, 4, 1)))
    covered = [one.low <= 0.44 <= one.high for one in map(estimate_trials, runs)]
    assert 0.94 <= np.mean(covered) <= 0.96


def test_is_students_interval_of_log_medians():
    """Centre and interval are scipy's t interval of log medians, back-transformed, at the given alpha."""
    trials = [[1.0, 2.0, 9.0], [3.0], [2.0, 4.0]]
    estimate = estimate_trials(trials, alpha=0.1)
    logs = np.log([2.0, 3.0, 3.0])
    oracle = np.exp(stats.t.interval(0.9, 2, logs.mean(), stats.sem(logs)))
    assert (estimate.low, estimate.high) == pytest.approx(tuple(oracle))
    assert estimate.value == pytest.approx(18 ** (1 / 3))
    assert (estimate.replicates, estimate.samples) == (3, 6)


def test_one_replicate_has_no_interval():
    """One replicate has its median as value and no interval, whatever its number of samples."""
    estimate = estimate_trials([[0.1, 0.2, 0.3] * 100])
    assert (estimate.value, estimate.low, estimate.high, estimate.samples) == (0.2, None, None, 300)
    zero = estimate_trials([[0.0]])
    assert (zero.value, zero.low, zero.high) == (0.0, None, None)


def test_zero_median_is_taken_on_the_linear_scale():
    """With a median of zero or below, centre and interval are on the linear scale."""
    estimate = estimate_trials([[0.0], [1.0], [-0.4]])
    oracle = stats.t.interval(0.95, 2, 0.2, stats.sem([0.0, 1.0, -0.4]))
    assert estimate.value == pytest.approx(0.2)
    assert (estimate.low, estimate.high) == pytest.approx(oracle)
    assert estimate.low < 0


@pytest.mark.parametrize(
    ("trials", "alpha", "message"),
    [
        ([], 0.05, "trials has no trial"),
        ([[1.0], []], 0.05, "trials trial 1 has no samples"),
        ([[1.0], [2.0, math.nan]], 0.05, "trials trial 1 sample 1 is nan: samples must be finite"),
        ([[1.0]], 0.0, "alpha is 0.0"),
        ([[1.0]], 1.5, "alpha is 1.5"),
        ([[LARGEST, LARGEST]], 0.05, "check the units"),
        ([[LARGEST], [LARGEST], [-1.0]], 0.05, "check the units"),
    ],
)
def test_bad_input_is_an_error(trials, alpha, message):
    """Bad input raises an error that names the offending value."""
    with pytest.raises(ValueError, match=message):
        estimate_trials(trials, alpha=alpha)
