"""Tests of order-statistic intervals: scipy as the reference, coverage by simulation, and too few samples."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lorameter.stats import median_interval, percentile

lists = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=80)


@settings(max_examples=60, deadline=None)
@given(lists, st.sampled_from([0.01, 0.05, 0.1, 0.4]))
def test_median_interval_is_scipys(values, alpha):
    """The interval is that of scipy's quantile test, and missing where scipy has none."""
    estimate = median_interval(values, alpha=alpha)
    oracle = stats.quantile_test(values, q=0, p=0.5).confidence_interval(1 - alpha)
    assert estimate.value == pytest.approx(np.median(values))
    assert (estimate.low, estimate.high) == ((None, None) if math.isnan(oracle.low) else (oracle.low, oracle.high))
    assert (estimate.reason is None) == (estimate.low is not None)


@pytest.mark.parametrize("count", [6, 9, 12, 25])
def test_median_interval_covers(count):
    """For any distribution, the interval covers the true median in at least 95 % of runs."""
    rng = np.random.default_rng(61)
    runs = rng.lognormal(0.0, 1.5, (1500, count))
    covered = np.mean([one.low <= 1.0 <= one.high for one in map(median_interval, runs)])
    assert covered >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 1500)


@pytest.mark.parametrize(("q", "needed"), [(0.9, 29), (0.95, 59), (0.99, 299), (0.1, 29), (0.5, 5)])
def test_percentile_needs_its_samples(q, needed):
    """With one sample too few there is no percentile, and the reason has the needed number."""
    short = percentile(range(needed - 1), q)
    assert (short.value, short.low, short.high) == (None, None, None)
    assert short.reason == f"p{100 * q:.4g} is not supported by n = {needed - 1}: a confidence of 95 % takes {needed}"
    assert percentile(range(needed), q).reason is None


@settings(max_examples=60, deadline=None)
@given(st.integers(29, 400), st.sampled_from([0.1, 0.5, 0.75, 0.9]), st.sampled_from([0.8, 0.95]))
def test_percentile_bounds_are_scipys(count, q, confidence):
    """Each bound is scipy's one-sided order-statistic bound."""
    samples = np.random.default_rng(count).normal(size=count)
    estimate = percentile(samples, q, confidence=confidence)
    for bound, alternative in (("high", "less"), ("low", "greater")):
        oracle = stats.quantile_test(samples, q=0, p=q, alternative=alternative).confidence_interval(confidence)
        assert getattr(estimate, bound) == getattr(oracle, bound)
    assert estimate.value == pytest.approx(np.quantile(samples, q))
    assert estimate.low <= estimate.value <= estimate.high


def test_effective_size_decides():
    """A thousand dependent samples with an effective size of 28 have no p90; with 29 its upper bound is the largest
    sample."""
    short = percentile(range(1000), 0.9, effective_size=28.9)
    assert short.value is None
    assert "n = 28 (what 1000 dependent samples are worth)" in short.reason
    enough = percentile(range(1000), 0.9, effective_size=29.0)
    assert enough.high == 999
    assert enough.low < percentile(range(1000), 0.9).low
    assert percentile(range(30), 0.9, effective_size=1e9) == percentile(range(30), 0.9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: median_interval([]), "values has no samples"),
        (lambda: median_interval([1.0, math.nan]), "values sample 1 is nan"),
        (lambda: median_interval([1.0], alpha=1.0), "alpha is 1.0"),
        (lambda: percentile([], 0.9), "samples has no samples"),
        (lambda: percentile([1.0, math.inf], 0.9), "samples sample 1 is inf"),
        (lambda: percentile([1.0], 99), "q is 99"),
        (lambda: percentile([1.0], 0.9, confidence=0), "confidence is 0"),
        (lambda: percentile([1.0], 0.9, effective_size=0.5), "effective_size is 0.5"),
    ],
)
def test_bad_input_is_an_error(call, message):
    """Bad input raises an error that names the offending value."""
    with pytest.raises(ValueError, match=message):
        call()
