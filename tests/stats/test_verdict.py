"""The rule: what clears the tolerance, what fits the margin, what is left."""

import dataclasses
import math

import pytest

from lorameter.stats.effect import Spread
from lorameter.stats.verdict import Comparison, VerdictRule


def rule(**changes):
    """The default rule, with changes."""
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
    """An interval beyond the tolerance decides first, then one inside the margin; the limits are symmetric on logs."""
    assert rule().judge(math.log(ratio), half, half) == verdict


def test_two_intervals_decide_two_questions():
    """The wide interval raises the alarm, the narrow one the equivalence."""
    assert rule().judge(0.0, 0.06, 0.04) == "equivalent"
    assert rule().judge(0.0, 0.04, 0.06) == "inconclusive"


def test_tolerance_wider_than_the_margin():
    """Between margin and tolerance there is neither an alarm nor equivalence."""
    assert rule(tolerance=0.1, margin=0.02).judge(math.log(1.05), 0.0, 0.0) == "inconclusive"


def test_family_narrows_the_tail():
    """Bonferroni: each comparison of a family has its share of alpha, half on either side."""
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
    """A limit that makes no sense is an error with its name and value, never a verdict."""
    with pytest.raises(ValueError, match=rf"^{name} is {value!r}: pass"):
        rule(**{name: value})


def test_comparison_is_frozen_with_the_contract_fields():
    """A comparison cannot be changed, and has the eight fields that other programs read."""
    names = [field.name for field in dataclasses.fields(Comparison)]
    assert names == ["verdict", "ratio", "low", "high", "reason", "replicates", "replicates_needed", "mde80"]
    comparison = Comparison(**dict.fromkeys(names))
    with pytest.raises(dataclasses.FrozenInstanceError):
        comparison.verdict = "improved"
