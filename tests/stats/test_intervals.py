"""Tests of quantiles and the sign test against the independent implementation of scipy.stats."""

import pytest
from scipy import stats

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
