"""Tests of effective_size: known processes, bounds by property, edge cases."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal

from lorameter.stats import effective_size


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
def test_bad_input_is_an_error(samples, message):
    """Bad input raises an error that names the offending value."""
    with pytest.raises(ValueError, match=message):
        effective_size(samples)
