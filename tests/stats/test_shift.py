"""run_wide_shift: the machine moves all benchmarks alike, the code moves some."""

import math

import numpy as np
import pytest

from lorameter.stats import run_wide_shift


def named(values):
    """Log ratios by benchmark."""
    return {f"benchmark {index}": value for index, value in enumerate(values)}


@pytest.mark.parametrize("factor", [1.05, 1.4, 1 / 1.2])
def test_all_by_one_factor_is_the_machine(factor):
    """Ten benchmarks that are all slower, or all faster, by about one factor: the machine changed."""
    values = np.random.default_rng(81).normal(math.log(factor), 0.01, 10)
    shift = run_wide_shift(named(values))
    assert shift.shifted
    assert shift.ratio == pytest.approx(factor, rel=0.02)
    assert "10 of 10 comparisons" in shift.reason
    assert "measure both sides in one run" in shift.reason


def test_one_regression_is_not_the_machine():
    """A single benchmark that regressed, however much, leaves the run valid."""
    values = [*np.random.default_rng(82).normal(0.0, 0.004, 9), math.log(2.0)]
    shift = run_wide_shift(named(values))
    assert not shift.shifted
    assert shift.reason.endswith("not a movement of all")


def test_each_by_its_own_amount_is_not_the_machine():
    """All slower, but by anything from 2 to 80 %, is not one factor."""
    shift = run_wide_shift(named(np.log([1.02, 1.04, 1.1, 1.2, 1.3, 1.45, 1.6, 1.8])))
    assert not shift.shifted
    assert "each moved by its own amount" in shift.reason


def test_five_cannot_tell_and_six_can():
    """All of five on one side is chance too often; all of six is not."""
    assert not run_wide_shift(named([0.2] * 5)).shifted
    assert run_wide_shift(named([0.2] * 6)).shifted


def test_identical_machines_are_rarely_called_shifted():
    """Independent noise without tolerance is called a shift in at most the 5 % of the sign test."""
    rng = np.random.default_rng(83)
    found = [run_wide_shift(named(rng.normal(0, 0.02, 10)), tolerance=0).shifted for _ in range(600)]
    assert np.mean(found) <= 0.05


@pytest.mark.parametrize(
    ("values", "limits", "message"),
    [
        ({"step": math.nan}, {}, "comparison 'step' sample 0 is nan"),
        ({"step": 1e4}, {}, "comparison 'step' has the log ratio 10000, .*check the units"),
        ({"step": -1e4}, {}, "comparison 'step' has the log ratio -10000"),
        ({"step": 0.1}, {"tolerance": -1}, "tolerance is -1"),
        ({"step": 0.1}, {"alpha": 0}, "alpha is 0"),
    ],
)
def test_bad_input_is_an_error(values, limits, message):
    """Bad input raises with the offender's name."""
    with pytest.raises(ValueError, match=message):
        run_wide_shift(values, **limits)
