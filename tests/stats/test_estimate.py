"""Tests of estimate_trials: coverage by simulation, the linear fallback, and edge cases.

Tests of is_precise: the width of the interval decides, not its centre.

Tests of comparisons with one reference that share their scatter: narrower intervals with the promised coverage.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lorameter.stats import (
    VerdictRule,
    compare_bytes,
    compare_trials,
    decide,
    estimate_trials,
    is_precise,
    relative_half_width,
    share_scatter,
)
from lorameter.stats.effect import PRIOR_DF, dunnett_tail, paired_effect
from lorameter.stats.intervals import quantile

LARGEST = 1.7976931348623157e308


def test_interval_covers_the_true_value():
    """The 95 % interval over 4 replicates covers the true geometric centre in 94 to 96 % of runs."""
    rng = np.random.default_rng(41)
    runs = np.exp(rng.normal(math.log(0.44), 0.1, (3000, 4, 1)))
    covered = [estimate.low <= 0.44 <= estimate.high for estimate in map(estimate_trials, runs)]
    assert 0.94 <= np.mean(covered) <= 0.96


def test_is_students_interval_of_log_medians():
    """Centre and interval are scipy's t interval of log medians, back-transformed, at the given alpha."""
    trials = [[1.0, 2.0, 9.0], [3.0], [2.0, 4.0]]
    estimate = estimate_trials(trials, alpha=0.1)
    logs = np.log([2.0, 3.0, 3.0])
    oracle = np.exp(stats.t.interval(0.9, 2, logs.mean(), stats.sem(logs)))
    assert (estimate.low, estimate.high) == pytest.approx(tuple(oracle))
    assert estimate.value == pytest.approx(18 ** (1 / 3))
    assert (estimate.replicates, estimate.samples) == (3, 6)


def test_one_replicate_has_no_interval():
    """One replicate has its median as value and no interval, whatever its number of samples."""
    estimate = estimate_trials([[0.1, 0.2, 0.3] * 100])
    assert (estimate.value, estimate.low, estimate.high, estimate.samples) == (0.2, None, None, 300)
    zero = estimate_trials([[0.0]])
    assert (zero.value, zero.low, zero.high) == (0.0, None, None)


def test_zero_median_is_taken_on_the_linear_scale():
    """With a median of zero or below, centre and interval are on the linear scale."""
    estimate = estimate_trials([[0.0], [1.0], [-0.4]])
    oracle = stats.t.interval(0.95, 2, 0.2, stats.sem([0.0, 1.0, -0.4]))
    assert estimate.value == pytest.approx(0.2)
    assert (estimate.low, estimate.high) == pytest.approx(oracle)
    assert estimate.low < 0


@pytest.mark.parametrize(
    ("trials", "alpha", "message"),
    [
        ([], 0.05, "trials has no trial"),
        ([[1.0], []], 0.05, "trials trial 1 has no samples"),
        ([[1.0], [2.0, math.nan]], 0.05, "trials trial 1 sample 1 is nan: samples must be finite"),
        ([[LARGEST, LARGEST]], 0.05, "check the units"),
        ([[LARGEST], [LARGEST], [-1.0]], 0.05, "check the units"),
    ],
)
def test_bad_input_is_an_error(trials, alpha, message):
    """Bad input raises an error that names the offending value."""
    with pytest.raises(ValueError, match=message):
        estimate_trials(trials, alpha=alpha)


def paired(values):
    """Return a comparison of replicates with these log ratios."""
    return compare_trials([[1.0]] * len(values), np.exp(values)[:, None], pairing="turn")


def scattered(centre, scale, replicates=6):
    """Return a comparison around `centre`, with the same scatter at any centre."""
    return paired(centre + scale * np.linspace(-1.0, 1.0, replicates))


def test_width_decides():
    """A quiet comparison is precise and a noisy one is not."""
    assert is_precise([scattered(0.0, 0.01)], half_width=0.025)
    assert not is_precise([scattered(0.0, 0.1)], half_width=0.025)
    assert not is_precise([scattered(0.0, 0.01), scattered(0.0, 0.1)], half_width=0.025)


def test_few_replicates_are_never_enough():
    """Four replicates may agree by chance and are never precise; the fifth can make the comparison precise."""
    assert not is_precise([paired(np.zeros(4))], half_width=0.5)
    assert is_precise([paired(np.zeros(5))], half_width=0.5)
    assert is_precise([paired(np.zeros(3))], half_width=0.5, least_replicates=3)


def test_without_an_interval_nothing_is_precise():
    """A missing comparison, one replicate, an overflowing bound and a missing ratio are not precise."""
    endless = compare_trials([[1.0], [2.0]], [[2.0], [1.0]], pairing="turn", family=10**6)
    no_ratio = compare_bytes([0] * 5, [1] * 5, tolerance=0)
    assert not is_precise([], half_width=0.5)
    for comparison in (paired(np.zeros(1)), endless, no_ratio):
        assert relative_half_width(comparison) is None
        assert not is_precise([comparison], half_width=0.5, least_replicates=2)


def test_stopping_keeps_the_error_rate():
    """With a look after each of 5 to 20 replicates, identical code is called regressed at about the nominal 2.5 %."""
    rng = np.random.default_rng(91)
    alarms = 0
    for _ in range(400):
        values = rng.normal(0.0, 0.02, 20)
        for count in range(5, 21):
            found = compare_trials([[1.0]] * count, np.exp(values[:count])[:, None], pairing="turn", tolerance=0.0)
            if is_precise([found], half_width=0.0125):
                break
        alarms += found.verdict == "regressed"
    assert alarms / 400 <= 0.025 + 3 * (0.025 * 0.975 / 400) ** 0.5


STUDIES = 1000
RULE = VerdictRule(tolerance=0.0, family=1)


def effects_of(logs):
    """Return the effect of each arm against the first; `logs` is arms × replicates."""
    return {str(arm): paired_effect(row - logs[0], "turn") for arm, row in enumerate(logs) if arm}


def simulated(scatter, replicates, *, tails=None, studies=STUDIES, seed=1):
    """Return log times of identical arms, studies × arms × replicates, with an effect of each replicate on all arms."""
    rng = np.random.default_rng(seed)
    shape = (studies, len(scatter), replicates)
    noise = rng.normal(size=shape) if tails is None else rng.standard_t(tails, shape) / math.sqrt(tails / (tails - 2))
    return 0.01 * np.asarray(scatter)[:, None] * noise + rng.normal(0.0, 0.3, (studies, 1, replicates))


SCATTERS = {
    "equal": lambda arms: [1.0] * arms,
    "reference-twice": lambda arms: [2.0, 2.0] + [1.0] * (arms - 2),
    "one-twice": lambda arms: [1.0, 1.0, 2.0] + [1.0] * (arms - 3),
    "one-three-times": lambda arms: [1.0, 1.0, 3.0] + [1.0] * (arms - 3),
    "one-five-times": lambda arms: [1.0, 1.0, 5.0] + [1.0] * (arms - 3),
}


@pytest.mark.parametrize("name", SCATTERS)
@pytest.mark.parametrize(("replicates", "arms"), [(3, 4), (5, 6)])
def test_all_intervals_of_a_run_cover_the_truth_in_94_percent_of_the_runs(name, replicates, arms):
    """In 1,000 simulated runs of identical arms, the first two arms are the reference and its second measurement."""
    rule = VerdictRule(tolerance=0.0, family=arms - 1)
    covered = 0
    for logs in simulated(SCATTERS[name](arms), replicates):
        shared = share_scatter(effects_of(logs)).values()
        covered += all(abs(one.log_ratio) <= one.spread.half_width(rule.tail(one.spread)) for one in shared)
    error = math.sqrt(0.94 * 0.06 / STUDIES)
    assert covered / STUDIES >= 0.94 - 2.6 * error  # a true coverage of 94 % fails in 0.5 % of the tests


def test_an_effect_of_a_replicate_on_all_arms_cancels():
    """A replicate in which every arm is slower by half does not change the shared scatter."""
    (logs,) = simulated([1.0] * 5, 4, studies=1)
    moved = logs + np.array([0.0, 0.5, 0.0, 0.0])
    before, after = share_scatter(effects_of(logs)), share_scatter(effects_of(moved))
    assert [one.spread.sd for one in after.values()] == pytest.approx([one.spread.sd for one in before.values()])


def test_an_arm_that_scatters_more_keeps_its_own_variance():
    """Quiet arms do not narrow the interval of a noisy arm."""
    (logs,) = simulated([1.0] * 6, 8, studies=1)
    logs[3] += np.array([0.3, -0.3] * 4)
    effects = effects_of(logs)
    shared = share_scatter(effects)
    assert shared["3"].spread.sd == pytest.approx(effects["3"].spread.sd, rel=0.05)
    assert shared["4"].spread.sd < 0.7 * shared["3"].spread.sd


def test_degrees_of_freedom_and_their_source_are_in_the_reason():
    """The reason gives the number of comparisons that share the scatter, and its degrees of freedom."""
    (logs,) = simulated([1.0] * 4, 3, studies=1)
    found = decide(share_scatter(effects_of(logs))["1"], RULE)
    assert f"scatter shared by 3 comparisons, {2 + PRIOR_DF} degrees of freedom" in found.reason


def test_one_comparison_and_one_replicate_share_nothing():
    """The effects are returned unchanged."""
    (logs,) = simulated([1.0] * 4, 3, studies=1)
    alone = effects_of(logs[:2])
    assert share_scatter(alone) == alone
    single = effects_of(logs[:, :1])
    assert share_scatter(single) == single


def test_effects_of_different_replicates_are_refused():
    """Columns of different lengths have no two-way layout."""
    effects = {"a": paired_effect(np.array([0.1, 0.2]), "turn"), "b": paired_effect(np.array([0.1, 0.2, 0.3]), "turn")}
    with pytest.raises(ValueError, match="must match exactly"):
        share_scatter(effects)


@pytest.mark.parametrize(
    ("df", "family", "critical"), [(6, 2, 2.86), (6, 5, 3.39), (10, 3, 2.76), (20, 9, 2.95), (5, 1, 2.571)]
)
def test_critical_values_are_those_of_dunnetts_table(df, family, critical):
    """Two-sided 5 % points of Dunnett (1964, Biometrics 20), and Student's t for one comparison."""
    assert quantile(df, dunnett_tail(df, 0.05, family)) == pytest.approx(critical, abs=0.01)
