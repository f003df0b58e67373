"""Tests of compare_trials: error rates and power by simulation, symmetries by property, edge cases by hand."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorameter.stats import MOST_ADVISED, compare_trials

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
    found = simulate(2500, 5, 0.0, 0.02, 21, shared=0.0 if pairing == "none" else 0.3, tolerance=0.0, pairing=pairing)
    lowest = 0.012 if pairing == "none" else 0.017
    for verdict in ("regressed", "improved"):
        assert lowest <= rate(verdict, found) <= 0.033


def test_at_the_tolerance_the_alarm_has_its_nominal_rate():
    """A true slow-down of exactly the tolerance is called regressed in 2.5 % of runs."""
    found = simulate(2000, 5, math.log(1.01), 0.01, 23, pairing="turn")
    assert 0.016 <= rate("regressed", found) <= 0.034


def test_interval_covers_the_true_ratio():
    """The 95 % interval covers the true ratio in 94 to 96 % of runs."""
    found = simulate(3000, 5, math.log(1.2), 0.05, 24, pairing="turn")
    assert 0.94 <= np.mean([one.low <= 1.2 <= one.high for one in found]) <= 0.96


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
    assert open_result.replicates_needed > MOST_ADVISED
    assert "measure" not in open_result.reason
    assert "80 % power" in open_result.reason
    nearly = compare_trials([[1.0], [1.0], [1.0]], [[0.99], [1.05], [1.02]], pairing="turn")
    assert nearly.replicates_needed <= MOST_ADVISED
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
        ({"pairing": "blocks"}, "pairing is 'blocks'"),
        ({"alpha": 1.0}, "alpha is 1.0"),
        ({"tolerance": -1}, "tolerance is -1"),
        ({"margin": 0}, "margin is 0"),
        ({"family": 0}, "family is 0"),
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
