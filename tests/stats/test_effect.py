"""Tests of effects against scipy.stats and of the two pairings.

Tests of planning numbers by simulating the planned runs.
"""

import math

import numpy as np
import pytest
from scipy import stats

from lorameter.stats import compare_trials, sd_interval
from lorameter.stats.effect import Spread, estimate_effect, log_ratios, paired_effect
from lorameter.stats.verdict import VerdictRule, detectable_effect, replicates_needed


def arrays(*trials):
    """Build the checked input of effects from trials."""
    return [np.array(trial, dtype=float) for trial in trials]


def noisy(rng, trials, samples, sd=0.1):
    """Return trials of lognormal samples."""
    return list(rng.lognormal(0.0, sd, (trials, samples)))


def test_turn_pairs_sample_by_sample():
    """By turn, a replicate's value is the median of its log ratios; a burst that hits both sides does not change it."""
    effect = estimate_effect(arrays([1, 9, 1, 30]), arrays([1.1, 9.9, 1.1, 33]), "turn")
    assert math.exp(effect.log_ratio) == pytest.approx(1.1)
    same_medians = estimate_effect(arrays([1, 2, 4]), arrays([2, 4, 1]), "turn")
    assert math.exp(same_medians.log_ratio) == pytest.approx(2.0)


def test_replicate_pairs_medians():
    """By replicate, a replicate's value is the log ratio of the medians, and the sample counts may differ."""
    effect = estimate_effect(arrays([1, 2, 100]), arrays([4, 4]), "replicate")
    assert math.exp(effect.log_ratio) == pytest.approx(2.0)


@pytest.mark.parametrize("pairing", ["turn", "replicate"])
def test_paired_interval_is_the_paired_t_interval(pairing):
    """The interval of paired trials is scipy's one-sample t interval of the log ratios."""
    rng = np.random.default_rng(1)
    base, candidate = noisy(rng, 6, 1), noisy(rng, 6, 1)
    effect = estimate_effect(base, candidate, pairing)
    oracle = stats.ttest_1samp(np.log(np.ravel(candidate) / np.ravel(base)), 0.0).confidence_interval(0.95)
    half = effect.spread.half_width(0.025)
    assert (effect.log_ratio - half, effect.log_ratio + half) == pytest.approx((oracle.low, oracle.high))


def test_unpaired_interval_is_welchs():
    """The interval of unpaired trials is scipy's Welch interval of the log medians, also with unequal counts."""
    rng = np.random.default_rng(2)
    base, candidate = noisy(rng, 4, 7, sd=0.1), noisy(rng, 9, 5, sd=0.4)
    effect = estimate_effect(base, candidate, "none")
    oracle = stats.ttest_ind(
        np.log(np.median(candidate, axis=1)), np.log(np.median(base, axis=1)), equal_var=False
    ).confidence_interval(0.9)
    half = effect.spread.half_width(0.05)
    assert (effect.log_ratio - half, effect.log_ratio + half) == pytest.approx((oracle.low, oracle.high))
    assert effect.replicates == 4


def test_log_ratios_are_those_of_the_effect():
    """Each replicate has one log ratio, and their mean is the effect."""
    rng = np.random.default_rng(4)
    base, candidate = noisy(rng, 5, 3), noisy(rng, 5, 3)
    for pairing in ("turn", "replicate"):
        values = log_ratios(base, candidate, pairing)
        assert values.shape == (5,)
        assert estimate_effect(base, candidate, pairing) == paired_effect(values, pairing)


def rule(**changes):
    """Return the default rule with changes."""
    return VerdictRule(**{"tolerance": 0.01, "margin": 0.05, "alpha": 0.05, "family": 1} | changes)


def paired(sd, replicates):
    """Return the spread of paired replicates with this sd."""
    return Spread(standard_error=sd / math.sqrt(replicates), df=replicates - 1, sd=sd, df_per_replicate=1.0)


def share(verdict, log_effect, sd, replicates, draws, seed, **limits):
    """Return how often `compare_trials` gives the verdict for a true log effect and a true sd."""
    rng = np.random.default_rng(seed)
    base = [[1.0]] * replicates
    candidates = np.exp(rng.normal(log_effect, sd, (draws, replicates, 1)))
    return np.mean([compare_trials(base, one, pairing="turn", **limits).verdict == verdict for one in candidates])


@pytest.mark.parametrize(("replicates", "family"), [(3, 1), (5, 1), (8, 10)])
def test_mde80_is_seen_with_80_percent_power(replicates, family):
    """An injected slow-down of the stated size is called regressed in 80 % of simulated runs."""
    effect = detectable_effect(paired(0.02, replicates), rule(family=family))
    seen = share("regressed", effect, 0.02, replicates, draws=1000, seed=11, family=family)
    assert seen == pytest.approx(0.8, abs=0.04)


def test_replicates_needed_is_the_minimum_that_resolves_the_margin():
    """With the stated number a slow-down of the margin is called regressed in 80 % of runs; with one fewer it is
    not."""
    needed = replicates_needed(paired(0.03, 5), rule(), may_be_equivalent=True)
    enough = share("regressed", math.log(1.05), 0.03, needed, draws=1500, seed=12)
    fewer = share("regressed", math.log(1.05), 0.03, needed - 1, draws=1500, seed=13)
    assert fewer < 0.77
    assert enough > 0.79


def test_replicates_needed_concludes_equivalence():
    """The stated number concludes equivalence in 80 % of A/A runs; one fewer does not."""
    limits = {"tolerance": 0.05, "margin": 0.05}
    needed = replicates_needed(paired(0.04, 5), rule(**limits), may_be_equivalent=True)
    enough = share("equivalent", 0.0, 0.04, needed, draws=1500, seed=14, **limits)
    fewer = share("equivalent", 0.0, 0.04, needed - 1, draws=1500, seed=15, **limits)
    assert fewer < 0.8 <= enough


def test_no_scatter_needs_two():
    """Without scatter two replicates are enough, and any slow-down beyond the tolerance is detectable."""
    assert replicates_needed(paired(0.0, 3), rule(), may_be_equivalent=True) == 2
    assert detectable_effect(paired(0.0, 3), rule()) == rule().tolerance_limit


def test_the_interval_of_a_deviation_has_its_nominal_coverage():
    """Over simulated runs of 24 replicates the 95 % interval covers the true standard deviation in 95 %."""
    sds = np.random.default_rng(8).normal(0, 0.02, (4000, 24)).std(axis=1, ddof=1)
    ends = [sd_interval(float(sd), 23) for sd in sds]
    assert 0.94 <= np.mean([low <= 0.02 <= high for low, high in ends]) <= 0.96
