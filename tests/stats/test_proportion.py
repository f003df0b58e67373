"""Tests of intervals of counts: scipy's for independent observations, and a wider one for clustered observations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from lorameter.stats import clustered_proportion, proportion


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
