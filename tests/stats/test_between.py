"""sd_between: the standard deviation between groups without the scatter within them, and its interval."""

from __future__ import annotations

import numpy as np
import pytest

from lorameter.stats import sd_between, sd_interval

SIZES = [(4,) * 4, (2,) * 4, (1, 3, 2, 2), (5, 5), (2, 9, 3), (1, 1, 1, 1, 1, 2)]


@pytest.mark.parametrize("between", [0.0, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_interval_holds_the_planted_deviation(sizes, between):
    """In 93.5 of 100 simulated cases or more, whatever groups differ by and however unlike their sizes are."""
    random, held = np.random.default_rng(11), 0
    for _ in range(800):
        groups = [random.normal(random.normal(0, between), 1, size).tolist() for size in sizes]
        found = sd_between(groups)
        assert found.low <= found.sd <= found.high
        held += found.low <= between <= found.high
    assert held / 800 >= 0.935


def test_of_one_value_each_it_is_what_is_seen():
    """With a chi-square interval; the scatter within the groups is in it, and unknown."""
    found = sd_between([[1.0], [2.0], [4.0]])
    assert not found.alone
    assert (found.low, found.high) == pytest.approx(sd_interval(found.sd, 2))


def test_values_that_do_not_scatter_leave_all_of_it():
    """Chance takes nothing off then."""
    found = sd_between([[1.0, 1.0], [3.0, 3.0]])
    assert (found.sd, *sd_interval(found.sd, 1)) == pytest.approx((found.sd, found.low, found.high))


@pytest.mark.parametrize("groups", [[], [[1.0, 2.0]], [[1.0], []]])
def test_fewer_than_two_groups_are_refused(groups):
    """One has nothing to differ from."""
    with pytest.raises(ValueError, match="two groups or more"):
        sd_between(groups)
