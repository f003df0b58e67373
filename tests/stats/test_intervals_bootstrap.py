"""Tests of the interval of a difference of medians: its coverage, and its refusals."""

from __future__ import annotations

import numpy as np
import pytest

from lorameter.stats import bootstrap_interval


def left(whole, part, axis=-1):
    return np.median(whole, axis=axis) - np.median(part, axis=axis)


def test_a_difference_of_medians_of_the_same_turns_is_covered():
    """The coverage is 95 % over simulated turns whose common noise is ten times their own noise."""
    random = np.random.default_rng(4)
    covered = 0
    for _ in range(300):
        shared = random.lognormal(0.0, 0.1, size=40)
        whole, part = 1.05 * shared * random.lognormal(0.0, 0.01, 40), shared * random.lognormal(0.0, 0.01, 40)
        low, high = bootstrap_interval((whole, part), left)
        covered += low <= 0.05 <= high
    assert covered / 300 > 0.92


def test_too_few_samples_have_no_interval_and_unequal_ones_are_refused():
    """At least six samples are needed, as for a median."""
    assert bootstrap_interval(((1.0,) * 5, (1.0,) * 5), left) == (None, None)
    with pytest.raises(ValueError, match="as many in each"):
        bootstrap_interval(((1.0,) * 8, (1.0,) * 7), left)
