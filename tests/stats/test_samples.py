"""Tests that refusals name the side, the trial, the sample, the value and the remedy."""

import math
from fractions import Fraction

import numpy as np
import pytest

from lorameter.stats.samples import checked_number, checked_trials, medians_of


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -0.5])
def test_sample_that_is_no_duration_is_named(bad):
    """A sample that is not finite and positive is refused by side, trial, index and value."""
    with pytest.raises(ValueError, match=rf"base trial 1 sample 2 is {bad!s}: .*leave it out"):
        checked_trials("base", [[1.0, 2.0], [1.0, 2.0, bad]], positive=True)


@pytest.mark.parametrize("nested", [[[1.0, 2.0]], [1.0, [2.0]], 1.0])
def test_wrong_depth_is_refused(nested):
    """A trial that is not a flat list is refused with the expected form."""
    with pytest.raises(ValueError, match=r"candidate trial 0 is .*one flat list of numbers"):
        checked_trials("candidate", [nested], positive=True)


def test_accepts_lists_arrays_and_exact_numbers():
    """Lists of ints or fractions, tuples and arrays become the same floats, and the input is unchanged."""
    given = np.array([1.0, 2.0])
    arrays = checked_trials("base", [[1, 2], (Fraction(1), Fraction(2)), given], positive=True)
    assert [array.tolist() for array in arrays] == [[1.0, 2.0]] * 3
    arrays[2][0] = 9
    assert given[0] == 1.0


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf, "1", None, True])
def test_limit_out_of_range_is_named(bad):
    """A limit that is not a finite number in range is refused by name and value."""
    with pytest.raises(ValueError, match=r"tolerance is .*at least 0"):
        checked_number("tolerance", bad, at_least=0, strictly=False)


def test_medians_are_those_of_each_trial():
    """Medians are bit-equal, whether computed at once or one by one for trials of different lengths."""
    rng = np.random.default_rng(7)
    for sizes in ([6] * 4, [5] * 4, [1, 2, 3], [8]):
        trials = [rng.lognormal(0, 3, size) for size in sizes]
        assert medians_of(trials).tolist() == [float(np.median(trial)) for trial in trials]
