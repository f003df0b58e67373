"""Tests of the warm-up: when simulated step times are steady enough to stop discarding them."""

import math

import numpy as np
import pytest

from lorameter.stats import is_steady

STEP = np.arange(60)


def first_steady(series, window):
    """Return the number of steps after which `is_steady` is true first."""
    return next((count for count in range(1, len(series) + 1) if is_steady(series[:count], window)), None)


def stops(shape, sd, window, draws=150, seed=63):
    """Return the first steady counts of simulated series."""
    rng = np.random.default_rng(seed)
    return [first_steady(np.exp(rng.normal(shape, sd)).tolist(), window) for _ in range(draws)]


def test_online_waits_for_two_windows():
    """Fewer than two windows are never steady; two flat ones are."""
    assert not is_steady([1.0] * 9, 5)
    assert is_steady([1.0] * 10, 5)


@pytest.mark.parametrize("sd", [0.003, 0.02, 0.1])
def test_online_stops_soon_on_flat_noise(sd):
    """In 95 % of runs, flat noise is steady within one window after the earliest possible step."""
    assert np.mean([stop is not None and stop <= 15 for stop in stops(np.zeros(60), sd, 5)]) >= 0.95


@pytest.mark.parametrize("sd", [0.003, 0.02])
def test_online_continues_while_the_warm_up_decays(sd):
    """A decaying warm-up ends, and not before its remaining excess is below a tenth."""
    counts = stops(np.exp(-STEP / 5), sd, 5)
    assert None not in counts
    assert np.mean([math.exp(-(count - 1) / 5) < 0.1 for count in counts]) >= 0.95


def test_online_ignores_old_steps_and_one_hiccup():
    """Only the last two windows count, and one slow step in either does not decide."""
    assert is_steady([99.0] * 5 + [1.0] * 10, 5)
    assert is_steady([1.0, 1.0, 9.0, 1.0, 1.0] + [1.0] * 5, 5)
    assert is_steady([1.0] * 5 + [1.0, 0.1, 1.0, 1.0, 1.0], 5)


def test_online_tolerance_bounds_the_drop():
    """A drop within the tolerance is steady, a larger one is not, and a rise is."""
    assert is_steady([1.015] * 3 + [1.0] * 3, 3)
    assert not is_steady([1.025] * 3 + [1.0] * 3, 3)
    assert is_steady([1.025] * 3 + [1.0] * 3, 3, tolerance=0.03)
    assert is_steady([1.0] * 3 + [1.5] * 3, 3)


def test_online_bad_input_is_an_error():
    """An empty window and a sample that is not a duration are refused, the sample by its index in the whole series."""
    with pytest.raises(ValueError, match="window is 0"):
        is_steady([1.0, 1.0], 0)
    with pytest.raises(ValueError, match="samples sample 3 is nan"):
        is_steady([1.0, 1.0, 1.0, math.nan], 2)
