"""Tests of is_precise: the width of the interval decides, not its centre."""

import numpy as np
import pytest

from lorameter.stats import compare_bytes, compare_trials, is_precise, relative_half_width


def paired(values):
    """Return a comparison of replicates with these log ratios."""
    return compare_trials([[1.0]] * len(values), np.exp(values)[:, None], pairing="turn")


def scattered(centre, scale, replicates=6):
    """Return a comparison around `centre`, with the same scatter at any centre."""
    return paired(centre + scale * np.linspace(-1.0, 1.0, replicates))


def test_width_decides():
    """A quiet comparison is precise and a noisy one is not."""
    assert is_precise([scattered(0.0, 0.01)], half_width=0.025)
    assert not is_precise([scattered(0.0, 0.1)], half_width=0.025)
    assert not is_precise([scattered(0.0, 0.01), scattered(0.0, 0.1)], half_width=0.025)


def test_few_replicates_are_never_enough():
    """Four replicates may agree by chance and are never precise; the fifth can make the comparison precise."""
    assert not is_precise([paired(np.zeros(4))], half_width=0.5)
    assert is_precise([paired(np.zeros(5))], half_width=0.5)
    assert is_precise([paired(np.zeros(3))], half_width=0.5, least_replicates=3)


def test_without_an_interval_nothing_is_precise():
    """A missing comparison, one replicate, an overflowing bound and a missing ratio are not precise."""
    endless = compare_trials([[1.0], [2.0]], [[2.0], [1.0]], pairing="turn", family=10**6)
    no_ratio = compare_bytes([0] * 5, [1] * 5, tolerance=0)
    assert not is_precise([], half_width=0.5)
    for comparison in (paired(np.zeros(1)), endless, no_ratio):
        assert relative_half_width(comparison) is None
        assert not is_precise([comparison], half_width=0.5, least_replicates=2)


def test_stopping_keeps_the_error_rate():
    """With a look after each of 5 to 20 replicates, identical code is called regressed at about the nominal 2.5 %."""
    rng = np.random.default_rng(91)
    alarms = 0
    for _ in range(1000):
        values = rng.normal(0.0, 0.02, 20)
        for count in range(5, 21):
            found = compare_trials([[1.0]] * count, np.exp(values[:count])[:, None], pairing="turn", tolerance=0.0)
            if is_precise([found], half_width=0.0125):
                break
        alarms += found.verdict == "regressed"
    assert alarms / 1000 <= 0.025 + 3 * (0.025 * 0.975 / 1000) ** 0.5


@pytest.mark.parametrize(
    ("limits", "message"),
    [({"half_width": 0}, "half_width is 0"), ({"half_width": 0.1, "least_replicates": 1}, "least_replicates is 1")],
)
def test_bad_limits_are_an_error(limits, message):
    """An invalid limit raises an error with its name."""
    with pytest.raises(ValueError, match=message):
        is_precise([], **limits)
