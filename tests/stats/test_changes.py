"""Tests of changes of level: present changes are found, absent ones are not, by the optimal segmentation."""

import math

import numpy as np
import pytest

from lorameter.stats.changes import MIN_POINTS, MIN_SEGMENT, find_changes, find_segments


def noise(count, *, sd=0.02, seed=0):
    return np.random.default_rng(seed).normal(0.0, sd, count)


@pytest.mark.parametrize("seed", range(12))
def test_change_points_equal_those_of_pelt(seed):
    """The reference is ruptures with the same least-squares cost, penalty and shortest segment, on random levels and
    noise."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(8, 160))
    levels = rng.normal(0.0, 3.0, count) * (rng.random(count) < 4 / count)
    values = np.cumsum(levels) + rng.standard_normal(count)
    penalty = float(rng.uniform(3, 30))
    ruptures = pytest.importorskip("ruptures", reason="has no wheel for this Python")
    pelt = ruptures.Pelt(model="l2", min_size=MIN_SEGMENT, jump=1).fit(values)
    assert list(find_segments(values, penalty)) == pelt.predict(pen=penalty)


def test_a_change_is_found_with_its_size_and_place():
    """The interval of the change covers its size, and both levels are returned."""
    values = noise(60)
    values[40:] += math.log(1.10)
    course = find_changes(values)
    assert [change.first for change in course.changes] == [40]
    change = course.changes[0]
    assert change.low < math.log(1.10) < change.high
    assert [(level.first, level.end) for level in course.levels] == [(0, 40), (40, 60)]
    assert course.scatter == pytest.approx(0.02, rel=0.3)


def test_fewer_than_ten_points_have_no_change():
    """Fewer than ten points have no change, whatever their values, and one level without an interval."""
    values = noise(MIN_POINTS - 1)
    values[5:] += 1.0
    course = find_changes(values)
    assert (course.changes, course.scatter, course.detectable) == ((), None, None)
    assert [(level.first, level.end, level.low) for level in course.levels] == [(0, 9, None)]
    assert find_changes([]).levels == ()


@pytest.mark.parametrize("place", [0, 7, 20, 38, 39])
def test_a_single_outlier_is_not_a_change(place):
    """A single outlier is not a change, whatever its size and place; the level hardly moves."""
    values = noise(40, seed=8)
    level = find_changes(values).levels[0].value
    values[place] += 3.0
    course = find_changes(values)
    assert not course.changes
    assert course.levels[0].value == pytest.approx(level, abs=0.01)


def test_constant_values_are_one_level():
    """Constant values have no scatter, and no change is found."""
    course = find_changes([1.5] * 20)
    assert (course.changes, course.scatter) == ((), 0.0)
    assert [(level.low, level.value, level.high) for level in course.levels] == [(1.5, 1.5, 1.5)]
    assert not find_changes([0.1] * 33).changes


def test_a_step_of_values_that_do_not_scatter_is_found():
    """Sizes in bytes, for example, are equal in every run until they change."""
    course = find_changes([20.0] * 15 + [20.1] * 4)
    (change,) = course.changes
    assert (change.first, change.low, change.high) == (15, pytest.approx(0.1), pytest.approx(0.1))
    assert course.detectable == pytest.approx(0.0, abs=1e-12)


def test_noise_without_a_change_gives_few_false_ones():
    """For lines of 90 nights, one false change in 200 nights would be 27 in these 60 lines."""
    false = sum(len(find_changes(noise(90, seed=seed)).changes) for seed in range(60))
    assert false <= 10


def test_changes_of_the_detectable_size_are_found():
    """A change of the stated detectable size is found within three nights in about four of five lines."""
    found = 0
    for seed in range(80):
        values = noise(60, seed=seed)
        size = find_changes(values[:57]).detectable
        values[57:] += size
        found += any(abs(change.first - 57) <= 2 for change in find_changes(values).changes)
    assert 48 <= found <= 76
