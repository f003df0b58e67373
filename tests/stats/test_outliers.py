"""Tests that outliers are counted by Tukey's fences, each in its own trial."""

import math

import numpy as np
import pytest

from lorameter.stats import count_outliers

# Quartiles 25 and 75 by linear interpolation: the fences are at -50 and 150.
EVEN = [float(value) for value in range(101)]


@pytest.mark.parametrize(
    ("extremes", "count"), [((50, 148, -48), 0), ((152, 148), 1), ((-52, 152, 230), 3)], ids=["inside", "one", "three"]
)
def test_values_beyond_the_fences_are_counted(extremes, count):
    """Outliers on both sides among many regular values hardly move the quartiles."""
    assert count_outliers([[*EVEN * 40, *extremes]]) == count


def test_normal_noise_has_the_known_share():
    """The known share is 0.7 %."""
    assert 0.005 < count_outliers([np.random.default_rng(51).normal(size=20_000).tolist()]) / 20_000 < 0.009


def test_nan_is_refused():
    """The error has the index of the NaN sample."""
    with pytest.raises(ValueError, match="samples sample 1 is nan"):
        count_outliers([[1.0, math.nan]])
