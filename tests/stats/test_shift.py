"""Tests of run_wide_shift: a shift of all benchmarks is a change of the machine, a shift of some is a change of the
code."""

import math

import numpy as np
import pytest

from lorameter.stats import run_wide_shift


def named(values):
    """Return the log ratios keyed by benchmark."""
    return {f"benchmark {index}": value for index, value in enumerate(values)}


@pytest.mark.parametrize("factor", [1.05, 1.4, 1 / 1.2])
def test_a_common_factor_is_a_change_of_the_machine(factor):
    """Ten benchmarks that all change by about one factor, slower or faster, are reported as a change of the machine."""
    values = np.random.default_rng(81).normal(math.log(factor), 0.01, 10)
    shift = run_wide_shift(named(values))
    assert shift.shifted
    assert shift.ratio == pytest.approx(factor, rel=0.02)
    assert "10 of 10 comparisons" in shift.reason
    assert "measure both sides in one run" in shift.reason


def test_one_regression_is_not_a_change_of_the_machine():
    """A single benchmark that regressed, however much, leaves the run valid."""
    values = [*np.random.default_rng(82).normal(0.0, 0.004, 9), math.log(2.0)]
    shift = run_wide_shift(named(values))
    assert not shift.shifted
    assert shift.reason.endswith("not a movement of all")


def test_different_slow_downs_are_not_a_change_of_the_machine():
    """Benchmarks that are slower by 2 to 80 % have no common factor and are not reported as a shift."""
    shift = run_wide_shift(named(np.log([1.02, 1.04, 1.1, 1.2, 1.3, 1.45, 1.6, 1.8])))
    assert not shift.shifted
    assert "each moved by its own amount" in shift.reason


def test_five_of_one_sign_are_not_a_shift_and_six_are():
    """Five benchmarks of one sign occur too often by chance; six of one sign are a shift."""
    assert not run_wide_shift(named([0.2] * 5)).shifted
    assert run_wide_shift(named([0.2] * 6)).shifted


def test_identical_machines_are_rarely_called_shifted():
    """With independent noise and no tolerance, at most 5 % of the runs are called shifted, the level of the sign
    test."""
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
    """Bad input raises an error that names the offending value."""
    with pytest.raises(ValueError, match=message):
        run_wide_shift(values, **limits)
