"""Tests of comparisons with one reference that share their scatter: narrower intervals with the promised coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lorameter.stats import VerdictRule, decide, share_scatter
from lorameter.stats.effect import paired_effect
from lorameter.stats.intervals import quantile
from lorameter.stats.shared_scatter import PRIOR_DF, dunnett_tail

STUDIES = 2000
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
@pytest.mark.parametrize(("replicates", "arms"), [(3, 4), (3, 6), (5, 6)])
def test_all_intervals_of_a_run_hold_the_truth_in_94_percent_of_the_runs(name, replicates, arms):
    """In 2,000 simulated runs of identical arms, the first two arms are the reference and its second measurement."""
    rule = VerdictRule(tolerance=0.0, family=arms - 1)
    held = 0
    for logs in simulated(SCATTERS[name](arms), replicates):
        shared = share_scatter(effects_of(logs)).values()
        held += all(abs(one.log_ratio) <= one.spread.half_width(rule.tail(one.spread)) for one in shared)
    error = math.sqrt(0.94 * 0.06 / STUDIES)
    assert held / STUDIES >= 0.94 - 2.6 * error  # a true coverage of 94 % fails in 0.5 % of the tests


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
    with pytest.raises(ValueError, match="share no scatter"):
        share_scatter(effects)


@pytest.mark.parametrize(
    ("df", "family", "critical"), [(6, 2, 2.86), (6, 5, 3.39), (10, 3, 2.76), (20, 9, 2.95), (5, 1, 2.571)]
)
def test_critical_values_are_those_of_dunnetts_table(df, family, critical):
    """Two-sided 5 % points of Dunnett (1964, Biometrics 20), and Student's t for one comparison."""
    assert quantile(df, dunnett_tail(df, 0.05, family)) == pytest.approx(critical, abs=0.01)
