"""Tests of planned looks: published levels, and the error rates of runs that end at a look."""

import math

import numpy as np
import pytest

from lorameter.stats import VerdictRule, decide
from lorameter.stats.effect import paired_effect
from lorameter.stats.looks import judge_at_looks, look_level, planned_looks


@pytest.mark.parametrize(("looks", "level"), [(1, 0.05), (2, 0.0294), (3, 0.0221), (4, 0.0182), (5, 0.0158)])
def test_levels_of_equal_groups_are_those_of_pocock(looks, level):
    """Table 1 of Pocock 1977, for an overall rate of 5 %."""
    assert look_level(0.05, tuple(range(1, looks + 1))) == pytest.approx(level, abs=6e-5)


@pytest.mark.parametrize(
    ("replicates", "looks"), [(2, (2,)), (5, (3, 4, 5)), (7, (3, 4, 5, 6, 7)), (20, (3, 4, 5, 6, 8, 10, 12, 20))]
)
def test_the_last_replicate_is_a_look(replicates, looks):
    """A run is always judged at its end."""
    assert planned_looks(replicates) == looks


def simulate(ratio, sd, runs=2000):
    """Return the replicates and the comparison of each of some runs that end when they are decided."""
    looks = planned_looks(12)
    rule = VerdictRule(alpha=look_level(0.05, looks))
    logs = np.random.default_rng(1).normal(math.log(ratio), sd, (runs, 12))
    return [
        judge_at_looks(lambda look, one=one: {"x": decide(paired_effect(one[:look], "turn"), rule)}, looks)
        for one in logs
    ]


def test_identical_code_is_seldom_called_different():
    """In at most 2.5 % on each side, although there are seven looks; the intervals keep their coverage."""
    ended = simulate(1.0, 0.02)
    verdicts = [found["x"].verdict for _, found in ended]
    assert verdicts.count("regressed") / len(ended) < 0.025
    assert verdicts.count("equivalent") / len(ended) > 0.95
    assert sum(found["x"].low <= 1 <= found["x"].high for _, found in ended) / len(ended) > 0.94
    assert sum(look for look, _ in ended) / len(ended) < 5


def test_a_slow_down_is_found_with_a_third_of_the_replicates():
    """8 % at a scatter of 2 %, with less than 4 of 12 replicates on average."""
    ended = simulate(1.08, 0.02)
    assert sum(found["x"].verdict == "regressed" for _, found in ended) / len(ended) > 0.99
    assert sum(look for look, _ in ended) / len(ended) < 4.5
