"""Tests of quantiles and the sign test against the independent implementation of scipy.stats.

Tests of the interval of a difference of medians: its coverage, and its refusals.

Tests of order-statistic intervals: scipy as the reference, coverage by simulation, and too few samples.

Tests of effective_size: known processes, bounds by property, edge cases.

Tests of intervals of counts: scipy's for independent observations, and a wider one for clustered observations.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal, stats
from scipy.stats import binomtest

from lorameter.stats import (
    bootstrap_interval,
    clustered_proportion,
    effective_size,
    median_interval,
    percentile,
    proportion,
)
from lorameter.stats.intervals import noncentrality, quantile, sign_test


@pytest.mark.parametrize("df", [1, 2, 4.3, 30, 5e5])
@pytest.mark.parametrize("tail", [0.4, 0.05, 0.025, 1e-6])
def test_quantile_is_students(df, tail):
    """The critical value is exceeded with the requested probability."""
    assert stats.t.sf(quantile(df, tail), df) == pytest.approx(tail, rel=1e-6)


@pytest.mark.parametrize("df", [1, 2, 4.3, 30, 1e4])
@pytest.mark.parametrize("tail", [0.05, 0.025, 0.025 / 20])
@pytest.mark.parametrize("power", [0.8, 0.9])
def test_noncentrality_reaches_the_power(df, tail, power):
    """The noncentral t with the returned noncentrality exceeds the critical value with the requested power."""
    assert stats.nct.sf(quantile(df, tail), df, noncentrality(df, tail, power)) == pytest.approx(power, abs=2e-4)


def test_tiny_tails_return():
    """A critical value in the thousands (one degree of freedom, a large family) is extrapolated smoothly and in finite
    time."""
    values = [noncentrality(1, tail, 0.8) * tail for tail in (4e-4, 3e-4, 1e-6, 1e-12)]
    assert values == pytest.approx([values[0]] * 4, rel=1e-3)


@pytest.mark.parametrize("tosses", [1, 2, 9, 101])
def test_sign_test_is_the_exact_binomial_test(tosses):
    """The same p-value as scipy's, for every number of heads."""
    for heads in range(tosses + 1):
        assert sign_test(heads, tosses) == pytest.approx(stats.binomtest(heads, tosses, 0.5).pvalue, rel=1e-12)


def left(whole, part, axis=-1):
    return np.median(whole, axis=axis) - np.median(part, axis=axis)


def test_a_difference_of_medians_of_the_same_turns_is_covered():
    """The coverage is 95 % over simulated turns whose common noise is ten times their own noise."""
    random = np.random.default_rng(4)
    covered = 0
    for _ in range(120):
        shared = random.lognormal(0.0, 0.1, size=40)
        whole, part = 1.05 * shared * random.lognormal(0.0, 0.01, 40), shared * random.lognormal(0.0, 0.01, 40)
        low, high = bootstrap_interval((whole, part), left)
        covered += low <= 0.05 <= high
    assert covered / 120 > 0.9


def test_too_few_samples_have_no_interval():
    """At least six samples are needed, as for a median."""
    assert bootstrap_interval(((1.0,) * 5, (1.0,) * 5), left) == (None, None)


lists = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=80)


@settings(max_examples=60, deadline=None)
@given(lists, st.sampled_from([0.01, 0.05, 0.1, 0.4]))
def test_median_interval_is_scipys(values, alpha):
    """The interval is that of scipy's quantile test, and missing where scipy has none."""
    estimate = median_interval(values, alpha=alpha)
    oracle = stats.quantile_test(values, q=0, p=0.5).confidence_interval(1 - alpha)
    assert estimate.value == pytest.approx(np.median(values))
    assert (estimate.low, estimate.high) == ((None, None) if math.isnan(oracle.low) else (oracle.low, oracle.high))


@pytest.mark.parametrize("count", [6, 9, 12, 25])
def test_median_interval_covers(count):
    """For any distribution, the interval covers the true median in at least 95 % of runs."""
    rng = np.random.default_rng(61)
    runs = rng.lognormal(0.0, 1.5, (1500, count))
    covered = np.mean([one.low <= 1.0 <= one.high for one in map(median_interval, runs)])
    assert covered >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 1500)


@pytest.mark.parametrize(("q", "needed"), [(0.9, 29), (0.95, 59), (0.99, 299), (0.1, 29), (0.5, 5)])
def test_percentile_needs_its_samples(q, needed):
    """With one sample too few there is no percentile."""
    assert percentile(range(needed - 1), q) is None
    assert percentile(range(needed), q) is not None


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
    assert percentile(range(1000), 0.9, effective_size=28.9) is None
    enough = percentile(range(1000), 0.9, effective_size=29.0)
    assert enough.high == 999
    assert enough.low < percentile(range(1000), 0.9).low
    assert percentile(range(30), 0.9, effective_size=1e9) == percentile(range(30), 0.9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: median_interval([]), "samples has no samples"),
        (lambda: median_interval([1.0, math.nan]), "samples sample 1 is nan"),
        (lambda: percentile([], 0.9), "samples has no samples"),
        (lambda: percentile([1.0, math.inf], 0.9), "samples sample 1 is inf"),
    ],
)
def test_bad_input_is_an_error(call, message):
    """Bad input raises an error that names the offending value."""
    with pytest.raises(ValueError, match=message):
        call()


def autoregressive(rng, count, phi):
    """Return a series in which each value depends on the previous one with the factor `phi`."""
    return signal.lfilter([1.0], [1.0, -phi], rng.normal(size=count + 100))[100:]


@pytest.mark.parametrize("phi", [0.3, 0.6, 0.8])
def test_autoregressive_series_have_their_known_size(phi):
    """An AR(1) series of n samples has an effective size of n (1 - phi) / (1 + phi)."""
    rng = np.random.default_rng(71)
    sizes = [effective_size(autoregressive(rng, 800, phi)) for _ in range(200)]
    assert np.median(sizes) == pytest.approx(800 * (1 - phi) / (1 + phi), rel=0.15)


def test_independent_samples_count_nearly_in_full():
    """Independent samples lose almost nothing, and the function is fast for a million samples."""
    rng = np.random.default_rng(73)
    assert np.median([effective_size(rng.normal(size=200)) for _ in range(200)]) > 180
    assert effective_size(rng.normal(size=10**6)) > 0.95e6


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=60))
def test_between_one_and_the_number_of_samples(samples):
    """For any samples, the size is finite and between 1 and their count."""
    assert 1 <= effective_size(samples) <= len(samples)


@pytest.mark.parametrize(("samples", "message"), [([], "no samples"), ([1.0, math.nan], "samples sample 1 is nan")])
def test_bad_input_of_an_effective_size_is_an_error(samples, message):
    """Bad input raises an error that names the offending value."""
    with pytest.raises(ValueError, match=message):
        effective_size(samples)


@pytest.mark.parametrize("of", [1, 2, 7, 32, 100])
def test_it_is_the_exact_interval(of):
    """The interval equals scipy's Clopper-Pearson interval at every count."""
    for count in range(of + 1):
        found, oracle = proportion(count, of), binomtest(count, of).proportion_ci(method="exact")
        assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high), abs=1e-12)
        assert found.share == count / of


@pytest.mark.parametrize(("count", "of"), [(-1, 3), (4, 3), (0, 0)])
def test_counts_that_are_not_a_share_are_refused(count, of):
    """The error has both numbers."""
    with pytest.raises(ValueError, match=f"{count} of {of}"):
        proportion(count, of)


def test_clusters_without_known_scatter_count_as_one_sample_each():
    """Zero in 20 answers of 32 tokens is not zero in 640 tokens; one answer gives almost no information."""
    assert clustered_proportion([0] * 20, [32] * 20).high == proportion(0, 20).high
    assert clustered_proportion([32] * 20, [32] * 20).low == proportion(20, 20).low
    (low, high) = ((one := clustered_proportion([3], [32])).low, one.high)
    assert low < 0.01
    assert high > 0.9


def test_the_clustered_interval_has_its_nominal_coverage():
    """For answers with correlated tokens, the interval covers the true share in at least 95 % of cases."""
    rng = np.random.default_rng(5)
    inside = 0
    for _ in range(400):
        shares = rng.beta(0.5, 2.0, size=24)  # of mean 0.2
        found = clustered_proportion(rng.binomial(16, shares).tolist(), [16] * 24)
        inside += found.low <= 0.2 <= found.high
    assert inside >= 0.93 * 400
