"""Tests of effects against scipy.stats and of the two pairings."""

import math

import numpy as np
import pytest
from scipy import stats

from lorameter.stats.effect import log_ratios, measure_effect, paired_effect


def arrays(*trials):
    """Build the checked input of effects from trials."""
    return [np.array(trial, dtype=float) for trial in trials]


def noisy(rng, trials, samples, sd=0.1):
    """Return trials of lognormal samples."""
    return list(rng.lognormal(0.0, sd, (trials, samples)))


def test_turn_pairs_sample_by_sample():
    """By turn, a replicate's value is the median of its log ratios; a burst that hits both sides does not change it."""
    effect = measure_effect(arrays([1, 9, 1, 30]), arrays([1.1, 9.9, 1.1, 33]), "turn")
    assert math.exp(effect.log_ratio) == pytest.approx(1.1)
    same_medians = measure_effect(arrays([1, 2, 4]), arrays([2, 4, 1]), "turn")
    assert math.exp(same_medians.log_ratio) == pytest.approx(2.0)


def test_replicate_pairs_medians():
    """By replicate, a replicate's value is the log ratio of the medians, and the sample counts may differ."""
    effect = measure_effect(arrays([1, 2, 100]), arrays([4, 4]), "replicate")
    assert math.exp(effect.log_ratio) == pytest.approx(2.0)


@pytest.mark.parametrize("pairing", ["turn", "replicate"])
def test_paired_interval_is_the_paired_t_interval(pairing):
    """The interval of paired trials is scipy's one-sample t interval of the log ratios."""
    rng = np.random.default_rng(1)
    base, candidate = noisy(rng, 6, 1), noisy(rng, 6, 1)
    effect = measure_effect(base, candidate, pairing)
    oracle = stats.ttest_1samp(np.log(np.ravel(candidate) / np.ravel(base)), 0.0).confidence_interval(0.95)
    half = effect.spread.half_width(0.025)
    assert (effect.log_ratio - half, effect.log_ratio + half) == pytest.approx((oracle.low, oracle.high))


def test_unpaired_interval_is_welchs():
    """The interval of unpaired trials is scipy's Welch interval of the log medians, also with unequal counts."""
    rng = np.random.default_rng(2)
    base, candidate = noisy(rng, 4, 7, sd=0.1), noisy(rng, 9, 5, sd=0.4)
    effect = measure_effect(base, candidate, "none")
    oracle = stats.ttest_ind(
        np.log(np.median(candidate, axis=1)), np.log(np.median(base, axis=1)), equal_var=False
    ).confidence_interval(0.9)
    half = effect.spread.half_width(0.05)
    assert (effect.log_ratio - half, effect.log_ratio + half) == pytest.approx((oracle.low, oracle.high))
    assert effect.replicates == 4


def test_log_ratios_are_those_of_the_effect():
    """Each replicate has one log ratio, and their mean is the effect; unpaired sides have none."""
    rng = np.random.default_rng(4)
    base, candidate = noisy(rng, 5, 3), noisy(rng, 5, 3)
    for pairing in ("turn", "replicate"):
        values = log_ratios(base, candidate, pairing)
        assert values.shape == (5,)
        assert measure_effect(base, candidate, pairing) == paired_effect(values, pairing)
    with pytest.raises(ValueError, match="not paired have no ratio"):
        log_ratios(base, candidate, "none")
