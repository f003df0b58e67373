"""The exact sign test."""

import pytest
from scipy.stats import binomtest

from lorameter.stats.intervals import sign_test


@pytest.mark.parametrize("tosses", [1, 2, 5, 6, 9, 30, 101])
def test_it_is_the_exact_binomial_test(tosses):
    """The same p-value as scipy's, for every number of heads."""
    for heads in range(tosses + 1):
        assert sign_test(heads, tosses) == pytest.approx(binomtest(heads, tosses, 0.5).pvalue, rel=1e-12)
