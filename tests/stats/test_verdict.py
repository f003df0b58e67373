"""Tests of the verdict rule: beyond the tolerance, within the margin, or neither."""

import math

import pytest

from lorameter.stats.effect import Spread
from lorameter.stats.verdict import VerdictRule


def rule(**changes):
    """Return the default rule with changes."""
    return VerdictRule(**{"tolerance": 0.01, "margin": 0.05, "alpha": 0.05, "family": 1} | changes)


@pytest.mark.parametrize(
    ("ratio", "half", "verdict"),
    [
        (1.05, 0.03, "regressed"),
        (1.05, 0.05, "inconclusive"),
        (1.02, 0.02, "equivalent"),
        (1.0, 0.04, "equivalent"),
        (1.0, 0.06, "inconclusive"),
        (0.95, 0.03, "improved"),
        (0.98, 0.02, "equivalent"),
        (0.95, 0.05, "inconclusive"),
        (1.0101, 0.0, "regressed"),
        (1.0099, 0.0, "equivalent"),
        (0.9900, 0.0, "improved"),
        (0.9902, 0.0, "equivalent"),
    ],
)
def test_verdict_follows_from_the_intervals(ratio, half, verdict):
    """An interval beyond the tolerance decides first, then one within the margin; the limits are symmetric on the log
    scale."""
    assert rule().judge(math.log(ratio), half, half) == verdict


def test_family_narrows_the_tail():
    """With Bonferroni each comparison of a family has its share of alpha, half on either side."""
    own = Spread(standard_error=1.0, df=4, sd=1.0, df_per_replicate=1.0)
    assert rule(family=10).tail(own) == pytest.approx(0.0025)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tolerance", -0.01),
        ("tolerance", math.nan),
        ("margin", 0.0),
        ("margin", math.inf),
        ("alpha", 0.0),
        ("alpha", 1.0),
        ("alpha", 5),
        ("alpha", math.nan),
        ("family", 0),
        ("family", 1.5),
        ("family", True),
    ],
)
def test_limits_out_of_range_are_refused_by_name(name, value):
    """An invalid limit is an error with its name and value."""
    with pytest.raises(ValueError, match=rf"^{name} is {value!r}: pass"):
        rule(**{name: value})
