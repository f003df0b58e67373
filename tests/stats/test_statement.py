"""Tests of the verdicts on a statement from replicates, with contrasts of known truth.

Tests of contrasts over the levels of an axis.

Tests of the share of scatter that another quantity explains.

Tests of compare_bytes: it compares maxima, without a test.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lorameter.stats import compare_bytes, explained_share
from lorameter.stats.trend import change_magnitudes, judge_above, judge_within, line_change

TOLERANCE = math.log1p(0.01)
MARGIN = math.log1p(0.05)


def around(*means, sd=0.003, replicates=6, seed=0):
    """Return contrasts, replicates × means, with these means and exactly the scatter `sd`."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 1, (replicates, len(means)))
    noise = (noise - noise.mean(axis=0)) / noise.std(axis=0, ddof=1)
    return np.array(means) + sd * noise


def status_and_reason(statement, contrasts, limit, **level):
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
    assert status_and_reason(judge_above, around(*means), TOLERANCE) == expected


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
    assert status_and_reason(judge_within, around(*means), MARGIN) == expected


def test_no_difference_refutes_beyond_without_correction():
    """Contrasts that are equal within the limit refute it even if the corrected interval still reaches it."""
    contrasts = around(0.0, 0.0, 0.0, sd=0.03)
    assert status_and_reason(judge_above, contrasts, MARGIN, family=20) == ("refuted", "equality")
    assert judge_above(contrasts, MARGIN, family=20).tail == 0.05


@pytest.mark.parametrize("mean", [0.0, 1e-17, -1e-17])
def test_rounding_decides_nothing(mean):
    """At a limit of zero, equal values are neither above nor below it."""
    contrasts = np.full((6, 2), mean)
    assert judge_above(contrasts, 0.0).status == judge_within(contrasts, 0.0).status == "inconclusive"


def test_a_family_widens_the_deciding_interval():
    """The deciding interval is that of alpha over the family."""
    contrasts = around(0.02, sd=0.006)
    assert status_and_reason(judge_above, contrasts, TOLERANCE) == ("supported", "difference")
    found = judge_above(contrasts, TOLERANCE, family=20)
    assert (found.status, found.tail) == ("inconclusive", pytest.approx(0.05 / 20 / 2))
    oracle = [stats.ttest_1samp(contrasts[:, 0], 0).confidence_interval(level) for level in (0.95, 1 - 0.05 / 20)]
    assert found.effect.interval(0.025) == pytest.approx((oracle[0].low, oracle[0].high))
    assert found.effect.interval(found.tail) == pytest.approx((oracle[1].low, oracle[1].high))


def test_refuting_by_the_worst_of_many_is_corrected():
    """One of ten contrasts refutes only at a tenth of the error rate; support needs no correction."""
    one = around(0.068, sd=0.01)
    assert judge_within(one, MARGIN).status == "refuted"
    many = np.hstack([one, around(*[0.0] * 9, seed=1)])
    found = judge_within(many, MARGIN)
    assert (found.status, found.contrast) == ("inconclusive", 0)
    found = judge_within(np.hstack([around(0.2, sd=0.01), many[:, 1:]]), MARGIN)
    assert found.tail == pytest.approx(0.05 / 10 / 2)


@given(st.lists(st.floats(-0.2, 0.2), min_size=2, max_size=8), st.floats(0.001, 0.1), st.integers(1, 30))
def test_never_both_above_and_within(values, limit, family):
    """With one limit, no contrast is supported both as larger and as within."""
    contrasts = np.array(values)[:, None]
    up, down, equal = (
        judge_above(contrasts, limit, family=family),
        judge_above(-contrasts, limit),
        judge_within(contrasts, limit),
    )
    assert [up.status, down.status, equal.status].count("supported") <= 1
    if equal.status == "supported":
        assert up.status == "refuted"


@pytest.mark.parametrize(
    ("statement", "mean", "false"),
    [(judge_above, TOLERANCE, "supported"), (judge_above, TOLERANCE, "refuted"), (judge_within, TOLERANCE, "supported"),
     (judge_within, TOLERANCE, "refuted")],
)  # fmt: skip
def test_false_statements_at_the_limit_keep_their_rate(statement, mean, false):
    """With the truth exactly at the limit, each assertion is made in at most 5 % of runs."""
    rng = np.random.default_rng(3)
    runs = 2000
    count = sum(statement(rng.normal(mean, 0.005, (6, 1)), TOLERANCE).status == false for _ in range(runs))
    assert stats.binomtest(count, runs, 0.05, "greater").pvalue > 0.001
    assert count > 0


def test_one_replicate_decides_nothing():
    """One replicate has no scatter, so its interval is infinite."""
    contrasts = np.zeros((1, 2))
    assert judge_above(contrasts, MARGIN).status == judge_within(contrasts, MARGIN).status == "inconclusive"


@pytest.mark.parametrize(
    ("statement", "mean", "limit", "decided"),
    [
        (judge_above, 0.014, TOLERANCE, "supported"),
        (judge_above, 0.006, TOLERANCE, "refuted"),
        (judge_within, 0.040, MARGIN, "supported"),
        (judge_within, 0.060, MARGIN, "refuted"),
    ],
)
def test_an_undecided_statement_has_the_replicates_it_needs(statement, mean, limit, decided):
    """The stated number has a power of 80 % or slightly more on simulated replicates of the same effect and scatter."""
    found = statement(around(mean, sd=0.02), limit)
    assert found.status == "inconclusive"
    assert found.replicates_needed > found.effect.replicates
    rng = np.random.default_rng(1)
    draws = [statement(rng.normal(mean, 0.02, (found.replicates_needed, 1)), limit).status for _ in range(300)]
    assert 0.72 < draws.count(decided) / 300 < 0.95


def test_decided_statements_and_those_at_the_limit_have_no_number():
    """More replicates change neither."""
    assert judge_above(around(0.3), TOLERANCE).replicates_needed is None
    assert judge_within(around(0.0), MARGIN).replicates_needed is None
    assert judge_above(np.array([[0.5], [-0.5]]), 0.0).replicates_needed is None


ALPHAS = (16.0, 32.0, 64.0, 128.0, 256.0)


def test_a_line_is_recovered():
    """A quantity that grows by 1 % with each doubling changes by four times that from 16 to 256."""
    logs = np.log([1.01**step for step in range(5)]) + np.array([[0.0], [0.3], [-2.0]])
    assert line_change(logs, ALPHAS, "log") == pytest.approx([np.log(1.01**4)] * 3)


def test_the_line_is_that_of_least_squares():
    """The change is the slope of numpy's fit times the distance between the first and the last level."""
    rng = np.random.default_rng(1)
    logs, positions = rng.normal(0, 1, (4, 6)), [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    slopes = [np.polyfit(positions, row, 1)[0] for row in logs]
    assert line_change(logs, positions, "linear") == pytest.approx(np.array(slopes) * 0.5)


def test_the_size_of_scatter_around_zero_is_small():
    """A change without a direction has a size near zero; a decrease has the same size as an increase."""
    scatter = np.random.default_rng(2).normal(0, 1, 1000)
    assert abs(change_magnitudes(scatter).mean()) < 0.1 < np.abs(scatter).mean()
    assert change_magnitudes(np.array([-0.3, -0.1])).tolist() == [0.3, 0.1]


def blocks(noise, replicates=5, points=40):
    rng = np.random.default_rng(4)
    tokens = rng.integers(5, 50, (replicates, points)).astype(float)
    return list(zip(tokens, 0.02 * tokens + rng.normal(0, noise, tokens.shape), strict=True))


def test_a_line_explains_everything():
    """If time is proportional to tokens the share is one, and its interval stays within [0, 1]."""
    share = explained_share(blocks(0.0))
    assert (share.value, share.low, share.high) == pytest.approx((1.0, 1.0, 1.0))
    assert (share.replicates, share.points) == (5, 200)


def test_noise_is_not_explained():
    """Noise with equal variance halves the share; the interval covers the true share."""
    share = explained_share(blocks(0.02 * 13.0))
    assert 0 < share.low < 0.5 < share.high < 1


def test_replicates_without_a_share_are_left_out():
    """Two points, equal x and equal y give no share; without other replicates there is none."""
    without_share = [([1, 2], [1, 2]), ([5, 5, 5], [1, 2, 3]), ([1, 2, 3], [4, 4, 4])]
    assert explained_share(without_share) is None
    one = explained_share([*without_share, ([1, 2, 3], [1, 3, 2])])
    assert (one.value, one.low, one.high, one.replicates) == (pytest.approx(0.25), None, None, 1)


GIB = 2**30


@pytest.mark.parametrize(
    ("candidate", "verdict"),
    [
        ([GIB, GIB], "equivalent"),
        ([GIB * 101 // 100], "equivalent"),
        ([GIB * 995 // 1000], "equivalent"),
        ([GIB * 102 // 100, GIB // 2], "regressed"),
        ([GIB * 98 // 100] * 5, "improved"),
    ],
)
def test_largest_peaks_are_compared(candidate, verdict):
    """Only the largest peak of each side counts, against the tolerance."""
    result = compare_bytes([GIB // 4, GIB, GIB // 2], candidate, tolerance=0.01)
    assert result.verdict == verdict
    assert result.ratio == result.low == result.high == max(candidate) / GIB


def test_zero_tolerance_is_exact():
    """Without tolerance one byte in a tebibyte decides, in both directions."""
    assert compare_bytes([2**40], [2**40 + 1], tolerance=0).verdict == "regressed"
    assert compare_bytes([2**40 + 1], [2**40], tolerance=0).verdict == "improved"


def test_zero_base():
    """Two peaks of zero are equal; any growth from zero is worse, without a ratio."""
    assert compare_bytes([0], [0], tolerance=0.1).ratio == 1.0
    grown = compare_bytes([0], [5], tolerance=0.1)
    assert (grown.verdict, grown.ratio, grown.low, grown.high) == ("regressed", None, None, None)
    assert compare_bytes([5], [0], tolerance=0.1).verdict == "improved"


@pytest.mark.parametrize(
    ("base", "candidate", "message"),
    [
        ([], [1], "base has no samples"),
        ([1], [1, -2], "candidate sample 1 is -2 bytes"),
        ([1, math.nan], [1], "base sample 1 is nan"),
        ([[1]], [1], "base is .*flat list"),
    ],
)
def test_bad_input_is_an_error(base, candidate, message):
    """Bad input raises an error that names the offending value."""
    with pytest.raises(ValueError, match=message):
        compare_bytes(base, candidate, tolerance=0.1)
