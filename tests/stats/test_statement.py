"""Tests of the verdicts on a statement from replicates, with contrasts of known truth."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lorameter.stats.statement import beyond, within

TOLERANCE = math.log1p(0.01)
MARGIN = math.log1p(0.05)


def around(*means, sd=0.003, replicates=6, seed=0):
    """Return contrasts, replicates × means, with these means and exactly the scatter `sd`."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 1, (replicates, len(means)))
    noise = (noise - noise.mean(axis=0)) / noise.std(axis=0, ddof=1)
    return np.array(means) + sd * noise


def both(statement, contrasts, limit, **level):
    found = statement(contrasts, limit, **level)
    return found.status, found.by


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ([0.04], ("supported", "difference")),
        ([-0.04], ("refuted", "difference")),
        ([0.0], ("refuted", "difference")),
        ([0.0101], ("inconclusive", "")),
        ([0.04, 0.05], ("supported", "difference")),
        ([0.04, -0.04], ("refuted", "difference")),
        ([0.04, 0.0102], ("inconclusive", "")),
    ],
)
def test_beyond(means, expected):
    """All contrasts above the limit support, one shown below it refutes, and one at the limit is inconclusive."""
    assert both(beyond, around(*means), TOLERANCE) == expected


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ([0.0], ("supported", "equality")),
        ([-0.04], ("supported", "equality")),
        ([0.06], ("refuted", "difference")),
        ([-0.06], ("refuted", "difference")),
        ([0.048], ("inconclusive", "")),
        ([0.0, 0.01, -0.02], ("supported", "equality")),
        ([0.0, 0.01, -0.07], ("refuted", "difference")),
        ([0.0, 0.01, -0.047], ("inconclusive", "")),
    ],
)
def test_within(means, expected):
    """All contrasts inside the limit support, one shown outside refutes, and one near the limit is inconclusive."""
    assert both(within, around(*means), MARGIN) == expected


def test_no_difference_refutes_beyond_without_correction():
    """Contrasts that are equal within the limit refute it even if the corrected interval still reaches it."""
    contrasts = around(0.0, 0.0, 0.0, sd=0.03)
    assert both(beyond, contrasts, MARGIN, family=20) == ("refuted", "equality")
    assert beyond(contrasts, MARGIN, family=20).level == pytest.approx(0.9)


@pytest.mark.parametrize("mean", [0.0, 1e-17, -1e-17])
def test_rounding_decides_nothing(mean):
    """At a limit of zero, equal values are neither above nor below it."""
    contrasts = np.full((6, 2), mean)
    assert beyond(contrasts, 0.0).status == within(contrasts, 0.0).status == "inconclusive"


def test_a_family_widens_the_deciding_interval():
    """The deciding interval is that of alpha over the family; the shown interval stays the 95 % one."""
    contrasts = around(0.02, sd=0.006)
    assert both(beyond, contrasts, TOLERANCE) == ("supported", "difference")
    found = beyond(contrasts, TOLERANCE, family=20)
    assert (found.status, found.level) == ("inconclusive", pytest.approx(1 - 0.05 / 20))
    oracle = [stats.ttest_1samp(contrasts[:, 0], 0).confidence_interval(level) for level in (0.95, 1 - 0.05 / 20)]
    assert (found.low, found.high) == pytest.approx((oracle[0].low, oracle[0].high))
    assert (found.decided_low, found.decided_high) == pytest.approx((oracle[1].low, oracle[1].high))


def test_refuting_by_the_worst_of_many_is_corrected():
    """One of ten contrasts refutes only at a tenth of the error rate; support needs no correction."""
    one = around(0.068, sd=0.01)
    assert within(one, MARGIN).status == "refuted"
    many = np.hstack([one, around(*[0.0] * 9, seed=1)])
    found = within(many, MARGIN)
    assert (found.status, found.contrast) == ("inconclusive", 0)
    assert within(np.hstack([around(0.2, sd=0.01), many[:, 1:]]), MARGIN).level == pytest.approx(1 - 0.05 / 10)


@given(st.lists(st.floats(-0.2, 0.2), min_size=2, max_size=8), st.floats(0.001, 0.1), st.integers(1, 30))
def test_never_both_above_and_within(values, limit, family):
    """With one limit, no contrast is supported both as larger and as within."""
    contrasts = np.array(values)
    up, down, equal = beyond(contrasts, limit, family=family), beyond(-contrasts, limit), within(contrasts, limit)
    assert [up.status, down.status, equal.status].count("supported") <= 1
    if equal.status == "supported":
        assert up.status == "refuted"


@pytest.mark.parametrize(
    ("statement", "mean", "false"),
    [(beyond, TOLERANCE, "supported"), (beyond, TOLERANCE, "refuted"), (within, TOLERANCE, "supported"),
     (within, TOLERANCE, "refuted")],
)  # fmt: skip
def test_false_statements_at_the_limit_keep_their_rate(statement, mean, false):
    """With the truth exactly at the limit, each assertion is made in at most 5 % of runs."""
    rng = np.random.default_rng(3)
    runs = 2000
    said = sum(statement(rng.normal(mean, 0.005, (6, 1)), TOLERANCE).status == false for _ in range(runs))
    assert stats.binomtest(said, runs, 0.05, "greater").pvalue > 0.001
    assert said > 0


@pytest.mark.parametrize(
    ("contrasts", "words"),
    [(np.zeros((1, 2)), "one replicate"), (np.zeros((3, 0)), "shape"), (np.array([[1.0], [math.nan]]), "finite")],
)
def test_invalid_contrasts_are_refused(contrasts, words):
    """One replicate, no contrast and a value that is not a number are refused."""
    with pytest.raises(ValueError, match=words):
        beyond(contrasts, MARGIN)


@pytest.mark.parametrize(
    ("statement", "mean", "limit", "decided"),
    [
        (beyond, 0.014, TOLERANCE, "supported"),
        (beyond, 0.006, TOLERANCE, "refuted"),
        (within, 0.040, MARGIN, "supported"),
        (within, 0.060, MARGIN, "refuted"),
    ],
)
def test_an_undecided_statement_has_the_replicates_it_needs(statement, mean, limit, decided):
    """The stated number has a power of 80 % or slightly more on simulated replicates of the same effect and scatter."""
    found = statement(around(mean, sd=0.02), limit)
    assert found.status == "inconclusive"
    assert found.replicates_needed > found.replicates
    rng = np.random.default_rng(1)
    draws = [statement(rng.normal(mean, 0.02, (found.replicates_needed, 1)), limit).status for _ in range(300)]
    assert 0.72 < draws.count(decided) / 300 < 0.95


def test_decided_statements_and_those_at_the_limit_have_no_number():
    """More replicates change neither."""
    assert beyond(around(0.3), TOLERANCE).replicates_needed is None
    assert within(around(0.0), MARGIN).replicates_needed is None
    assert beyond(np.array([[0.5], [-0.5]]), 0.0).replicates_needed is None
