"""Tests of compare_trials: error rates and power by simulation, symmetries by property, edge cases by hand.

Tests of Holm's procedure over several comparisons.

Tests of the verdict rule: beyond the tolerance, within the margin, or neither.

Tests of run_wide_shift: a shift of all benchmarks is a change of the machine, a shift of some is a change of the
code.

Tests of select_pairs: it drops whole pairs by their flags only, and never too many.
"""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lorameter.stats import MAX_ADVISED, compare_trials, decide_family, estimate_effect, run_wide_shift, select_pairs
from lorameter.stats.effect import Spread
from lorameter.stats.verdict import VerdictRule

durations = st.floats(min_value=1e-6, max_value=1e6)
sides = st.integers(1, 5).flatmap(
    lambda replicates: st.integers(1, 5).flatmap(
        lambda samples: st.tuples(
            *[
                st.lists(
                    st.lists(durations, min_size=samples, max_size=samples), min_size=replicates, max_size=replicates
                )
            ]
            * 2
        )
    )
)
pairings = st.sampled_from(["turn", "replicate", "none"])


def simulate(draws, replicates, log_effect, sd, seed, *, shared=0.0, samples=1, **limits):
    """Return comparisons of simulated runs: noise of `sd` for each side and replicate, and `shared` noise of both
    sides."""
    rng = np.random.default_rng(seed)
    both = rng.normal(0.0, shared, (draws, replicates, 1)) if shared else 0.0
    noise = rng.normal(0.0, sd, (2, draws, replicates, 1)) + rng.normal(0.0, sd, (2, draws, replicates, samples)) * (
        samples > 1
    )
    base, candidate = np.exp(noise[0] + both), np.exp(noise[1] + both + log_effect)
    return [compare_trials(one, other, **limits) for one, other in zip(base, candidate, strict=True)]


def rate(verdict, comparisons):
    """Return the share of comparisons with the verdict."""
    return np.mean([comparison.verdict == verdict for comparison in comparisons])


@pytest.mark.parametrize("pairing", ["turn", "replicate", "none"])
def test_false_alarms_come_at_the_nominal_rate(pairing):
    """A/A runs of 5 replicates with heavy shared noise and no tolerance give 2.5 % regressed and 2.5 % improved (Welch:
    at most)."""
    found = simulate(1500, 5, 0.0, 0.02, 21, shared=0.0 if pairing == "none" else 0.3, tolerance=0.0, pairing=pairing)
    lowest = 0.010 if pairing == "none" else 0.015
    for verdict in ("regressed", "improved"):
        assert lowest <= rate(verdict, found) <= 0.036


def test_at_the_tolerance_the_alarm_has_its_nominal_rate():
    """A true slow-down of exactly the tolerance is called regressed in 2.5 % of runs."""
    found = simulate(2000, 5, math.log(1.01), 0.01, 23, pairing="turn")
    assert 0.016 <= rate("regressed", found) <= 0.034


def test_interval_covers_the_true_ratio():
    """The 95 % interval covers the true ratio in about 95 % of runs."""
    found = simulate(1200, 5, math.log(1.2), 0.05, 24, pairing="turn")
    assert 0.935 <= np.mean([one.low <= 1.2 <= one.high for one in found]) <= 0.965


def test_equivalence_at_the_margin_is_a_five_percent_error():
    """A true slow-down of the margin is called equivalent in at most 5 % of runs, and in nearly 5 % with little
    noise."""
    found = simulate(2000, 8, math.log(1.05), 0.01, 25, tolerance=0.2, pairing="turn")
    assert 0.038 <= rate("equivalent", found) <= 0.062


def test_unpaired_is_never_equivalent():
    """Identical quiet sides are equivalent if paired; unpaired they are inconclusive, with a reason and no plan."""
    trials = [[1.0, 1.001], [1.001, 1.0], [1.0, 1.0]]
    assert compare_trials(trials, trials, pairing="replicate").verdict == "equivalent"
    unpaired = compare_trials(trials, trials, pairing="none")
    assert unpaired.verdict == "inconclusive"
    assert "never called equivalent" in unpaired.reason
    assert unpaired.replicates_needed is None


def test_an_inconclusive_result_has_the_detectable_effect():
    """An inconclusive result has the detectable effect and a plan, in fields and in words; a plan of hundreds is not
    advised."""
    base, candidate = [[1.0], [1.0], [1.0]], [[0.8], [1.3], [1.05]]
    open_result = compare_trials(base, candidate, pairing="turn")
    assert open_result.verdict == "inconclusive"
    assert open_result.mde80 > 0.3
    assert open_result.replicates_needed > 3
    assert open_result.replicates_needed > MAX_ADVISED
    assert "measure" not in open_result.reason
    assert "80 % power" in open_result.reason
    nearly = compare_trials([[1.0], [1.0], [1.0]], [[0.99], [1.05], [1.02]], pairing="turn")
    assert nearly.replicates_needed <= MAX_ADVISED
    assert f"measure {nearly.replicates_needed} replicates" in nearly.reason


def test_one_replicate_is_inconclusive():
    """One replicate has a ratio but no interval and no plan; the reason says so."""
    single = compare_trials([[1.0, 1.0]], [[2.0, 2.0]], pairing="turn")
    assert (single.verdict, single.ratio, single.replicates) == ("inconclusive", 2.0, 1)
    assert (single.low, single.high, single.mde80, single.replicates_needed) == (None, None, None, None)
    assert "one replicate" in single.reason


@pytest.mark.parametrize(("candidate", "verdict"), [(1.0, "equivalent"), (1.02, "regressed"), (0.98, "improved")])
def test_zero_variance_is_a_point(candidate, verdict):
    """Replicates without variance are decided by the point, and the reason says so."""
    result = compare_trials([[0.3], [0.3], [0.3]], [[0.3 * candidate]] * 3, pairing="turn")
    assert (result.verdict, result.low, result.high) == (verdict, result.ratio, result.ratio)
    assert result.ratio == pytest.approx(candidate)
    assert "no variance between replicates" in result.reason


def test_family_widens_the_alarm_and_not_the_equivalence():
    """A large family needs a larger effect for an alarm; equivalence is the same as alone."""
    base, candidate = [[1.0]] * 4, [[1.05], [1.06], [1.07], [1.06]]
    alone, in_family = (compare_trials(base, candidate, pairing="turn", family=size) for size in (1, 1000))
    assert (alone.verdict, in_family.verdict) == ("regressed", "inconclusive")
    assert in_family.low < alone.low < alone.high < in_family.high
    quiet = [[1.0], [1.02], [0.98], [1.0]]
    assert compare_trials(base, quiet, pairing="turn", family=1000).verdict == "equivalent"


def test_ratio_too_large_for_a_float_is_refused():
    """A ratio that overflows is an error."""
    with pytest.raises(ValueError, match="check the units"):
        compare_trials([[1e-300]], [[1e300]], pairing="turn")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": []}, "base has no trial"),
        ({"candidate": [[1.0], []]}, "candidate trial 1 has no samples"),
        ({"candidate": [[1.0], [2.0, math.nan]]}, "candidate trial 1 sample 1 is nan"),
        ({"base": [[0.0], [1.0]]}, r"base trial 0 sample 0 is 0\.0"),
        ({"base": [[1.0]]}, "base has 1 trials and candidate 2"),
        ({"base": [[1.0, 2.0], [1.0]]}, "trial 0: base has 2 samples and candidate 1"),
    ],
)
def test_bad_input_is_an_error(arguments, message):
    """Bad input raises an error that names the offending value."""
    good = {"base": [[1.0], [1.0]], "candidate": [[1.0], [1.0]], "pairing": "turn"} | arguments
    with pytest.raises(ValueError, match=message):
        compare_trials(good.pop("base"), good.pop("candidate"), **good)


@settings(max_examples=60, deadline=None)
@given(sides, pairings)
def test_swapping_sides_inverts(pair, pairing):
    """Swapping sides inverts the ratio and exchanges regressed and improved; other verdicts stay. Every valid input
    gives a result in strict JSON."""
    base, candidate = pair
    one, other = compare_trials(base, candidate, pairing=pairing), compare_trials(candidate, base, pairing=pairing)
    json.dumps(asdict(one), allow_nan=False)
    assert pairing != "none" or one.verdict != "equivalent"
    assert one.ratio * other.ratio == pytest.approx(1.0, rel=1e-9)
    assert other.verdict == {"regressed": "improved", "improved": "regressed"}.get(one.verdict, one.verdict)
    assert other.mde80 == (None if one.mde80 is None else pytest.approx(one.mde80, rel=1e-6))


def simulated(rng, effects, replicates=6, sd=0.02):
    """Return named pairs with these log effects."""
    return {
        f"metric {index}": ([[1.0]] * replicates, np.exp(rng.normal(effect, sd, (replicates, 1))))
        for index, effect in enumerate(effects)
    }


def compare_family(pairs):
    """Return the verdicts on named pairs without a tolerance."""
    effects = {name: estimate_effect(base, candidate, "turn") for name, (base, candidate) in pairs.items()}
    return decide_family(effects, dict.fromkeys(effects, VerdictRule(tolerance=0.0)))


def holm(p_values, alpha):
    """Apply Holm's published procedure: compare each sorted p-value with alpha over the remaining number, until one
    fails."""
    rejected = [False] * len(p_values)
    for rank, index in enumerate(np.argsort(p_values)):
        if p_values[index] > alpha / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


def test_decides_as_holms_sorted_p_values():
    """Over many simulated families, the decided comparisons are those that Holm's procedure rejects."""
    rng = np.random.default_rng(31)
    stepped = 0
    for _ in range(60):
        pairs = simulated(rng, [0.0, 0.0, 0.02, 0.025, 0.03, 0.05])
        p_values = [stats.ttest_1samp(np.log(np.ravel(candidate)), 0.0).pvalue for _, candidate in pairs.values()]
        found = compare_family(pairs)
        decided = [one.verdict in ("regressed", "improved") for one in found.values()]
        assert decided == holm(p_values, 0.05)
        stepped += decided != [p <= 0.05 / 6 for p in p_values]
    assert stepped > 0  # Bonferroni alone would not have passed


def test_family_of_identical_code_raises_few_alarms():
    """Ten A/A comparisons raise an alarm in about 5 % of runs; at 5 % each it would be 40 %."""
    rng = np.random.default_rng(32)
    alarms = 0
    for _ in range(250):
        found = compare_family(simulated(rng, [0.0] * 10))
        alarms += any(one.verdict in ("regressed", "improved") for one in found.values())
    assert 0.02 <= alarms / 250 <= 0.08


def test_each_comparison_can_have_its_own_pairing_and_limits():
    """The comparisons share only the error rate: each equals a plain comparison with that family size."""
    rng = np.random.default_rng(5)
    base = [list(trial) for trial in np.exp(rng.normal(0, 0.3, (6, 1)) + rng.normal(0, 0.1, (6, 9)))]
    turns = [[0.99 * sample for sample in trial] for trial in base]
    blocks = [[1.3 * sample for sample in reversed(trial)] for trial in base]
    found = decide_family(
        {"a": estimate_effect(base, turns, "turn"), "b": estimate_effect(base, blocks, "replicate")},
        {"a": VerdictRule(tolerance=0.02, margin=0.03), "b": VerdictRule(tolerance=0.5, margin=0.6)},
    )
    assert found["a"] == compare_trials(base, turns, pairing="turn", tolerance=0.02, margin=0.03, family=2)
    assert found["b"] == compare_trials(base, blocks, pairing="replicate", tolerance=0.5, margin=0.6, family=2)
    assert [one.verdict for one in found.values()] == ["equivalent", "equivalent"]


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


def named(values):
    """Return the log ratios keyed by benchmark."""
    return {f"benchmark {index}": value for index, value in enumerate(values)}


@pytest.mark.parametrize("factor", [1.05, 1.4, 1 / 1.2])
def test_a_common_factor_is_a_change_of_the_machine(factor):
    """Ten benchmarks that all change by about one factor, slower or faster, are reported as a change of the machine."""
    values = np.random.default_rng(81).normal(math.log(factor), 0.01, 10)
    reason = run_wide_shift(named(values))
    assert reason.startswith("10 of 10 comparisons")
    assert float(reason.partition("median ratio ")[2].partition(",")[0]) == pytest.approx(factor, rel=0.02)
    assert reason.endswith("measure both sides in one run")


def test_one_regression_is_not_a_change_of_the_machine():
    """A single benchmark that regressed, however much, leaves the run valid."""
    values = [*np.random.default_rng(82).normal(0.0, 0.004, 9), math.log(2.0)]
    assert run_wide_shift(named(values)) is None


def test_different_slow_downs_are_not_a_change_of_the_machine():
    """Benchmarks that are slower by 2 to 80 % have no common factor and are not reported as a shift."""
    assert run_wide_shift(named(np.log([1.02, 1.04, 1.1, 1.2, 1.3, 1.45, 1.6, 1.8]))) is None


def test_five_of_one_sign_are_not_a_shift_and_six_are():
    """Five benchmarks of one sign occur too often by chance; six of one sign are a shift."""
    assert run_wide_shift(named([0.2] * 5)) is None
    assert run_wide_shift(named([0.2] * 6)) is not None


def test_identical_machines_are_rarely_called_shifted():
    """With independent noise and no tolerance, at most 5 % of the runs are called shifted, the level of the sign
    test."""
    rng = np.random.default_rng(83)
    found = [run_wide_shift(named(rng.normal(0, 0.02, 10)), tolerance=0) is not None for _ in range(600)]
    assert np.mean(found) <= 0.05


def test_bad_input_of_a_shift_is_an_error():
    """The error names the value."""
    with pytest.raises(ValueError, match="log ratios sample 0 is nan"):
        run_wide_shift({"step": math.nan})


flags = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30)


def test_a_flag_on_either_side_drops_the_pair():
    """A flag on either side drops the pair, and the flags of both sides are counted."""
    indexes, reason = select_pairs([False, True, False, True, False], [False, False, True, True, False], least=2)
    assert indexes == (0, 4)
    assert reason == "dropped 3 of 5 pairs: base flagged in 2, candidate in 2"


def test_refuses_to_leave_too_little():
    """All pairs are kept if fewer than the minimum would remain, and the reason has both numbers."""
    indexes, reason = select_pairs([True, False, True, False], [False] * 4, least=3)
    assert indexes == (0, 1, 2, 3)
    assert reason == "dropping the 2 flagged of 4 pairs would leave 2, below 3: kept all"


@pytest.mark.parametrize(("one_sided", "balanced"), [(5, True), (6, False)])
def test_one_sided_flags_are_not_balanced(one_sided, balanced):
    """Six flags on one side are significant at 5 %; five are not."""
    indexes, reason = select_pairs([False] * 20, [True] * one_sided + [False] * (20 - one_sided), least=5)
    assert len(indexes) == (15 if balanced else 20)
    assert ("not balanced" in reason) == (not balanced)


def test_balance_is_rarely_denied_to_equal_sides():
    """Sides with equal flag rates are called unbalanced in at most 5 % of runs."""
    rng = np.random.default_rng(95)
    denied = ["not balanced" in select_pairs(*(rng.random((2, 40)) < 0.3), least=2)[1] for _ in range(600)]
    assert np.mean(denied) <= 0.05


@settings(max_examples=100, deadline=None)
@given(flags, st.integers(1, 10))
def test_every_pair_is_kept_or_flagged(pairs, least):
    """The kept pairs are the clean ones in order, or all; the result is symmetric in the sides."""
    base, candidate = [a for a, _ in pairs], [b for _, b in pairs]
    (indexes, reason), other = select_pairs(base, candidate, least=least), select_pairs(candidate, base, least=least)
    clean = tuple(index for index, pair in enumerate(pairs) if pair == (False, False))
    discordant = [a for a, b in pairs if a != b]
    balanced = not discordant or stats.binomtest(sum(discordant), len(discordant), 0.5).pvalue > 0.05
    enough = len(clean) >= min(least, len(pairs))
    assert indexes == other[0] == (clean if balanced and enough else tuple(range(len(pairs))))
    assert bool(reason) == any(map(any, pairs))
    assert ("not balanced" in reason) == (not balanced)
