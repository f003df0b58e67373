"""Tests of sd_between: the standard deviation between groups without the scatter within them, and its interval."""

from __future__ import annotations

import numpy as np
import pytest

from lorameter.stats import sd_between, sd_interval

SIZES = [(4,) * 4, (2,) * 4, (1, 3, 2, 2), (5, 5), (2, 9, 3), (1, 1, 1, 1, 1, 2)]


@pytest.mark.parametrize("between", [0.0, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_interval_holds_the_planted_deviation(sizes, between):
    """The interval covers the injected deviation in at least 93.5 % of simulated cases, for any deviation and group
    sizes."""
    random, held = np.random.default_rng(11), 0
    for _ in range(800):
        groups = [random.normal(random.normal(0, between), 1, size).tolist() for size in sizes]
        found = sd_between(groups)
        assert found.low <= found.sd <= found.high
        held += found.low <= between <= found.high
    assert held / 800 >= 0.935


def test_groups_of_one_value_have_a_chi_square_interval():
    """The interval is a chi-square interval; the unknown scatter within the groups is included."""
    found = sd_between([[1.0], [2.0], [4.0]])
    assert not found.alone
    assert (found.low, found.high) == pytest.approx(sd_interval(found.sd, 2))


def test_nothing_is_subtracted_without_scatter():
    """Without scatter nothing is subtracted."""
    found = sd_between([[1.0, 1.0], [3.0, 3.0]])
    assert (found.sd, *sd_interval(found.sd, 1)) == pytest.approx((found.sd, found.low, found.high))


@pytest.mark.parametrize("groups", [[], [[1.0, 2.0]], [[1.0], []]])
def test_fewer_than_two_groups_are_refused(groups):
    """A single group has nothing to differ from."""
    with pytest.raises(ValueError, match="two groups or more"):
        sd_between(groups)
