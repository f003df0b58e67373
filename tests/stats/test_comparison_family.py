"""Tests of Holm's procedure over several comparisons."""

import numpy as np
import pytest
from scipy import stats

from lorameter.stats import compare_family, compare_trials


def simulated(rng, effects, replicates=6, sd=0.02):
    """Return named pairs with these log effects."""
    return {
        f"metric {index}": ([[1.0]] * replicates, np.exp(rng.normal(effect, sd, (replicates, 1))))
        for index, effect in enumerate(effects)
    }


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
        found = compare_family(pairs, pairing="turn", tolerance=0.0)
        decided = [one.verdict in ("regressed", "improved") for one in found.values()]
        assert decided == holm(p_values, 0.05)
        stepped += decided != [p <= 0.05 / 6 for p in p_values]
    assert stepped > 0  # Bonferroni alone would not have passed


def test_family_of_identical_code_raises_few_alarms():
    """Ten A/A comparisons raise an alarm in about 5 % of runs; at 5 % each it would be 40 %."""
    rng = np.random.default_rng(32)
    alarms = 0
    for _ in range(400):
        found = compare_family(simulated(rng, [0.0] * 10), pairing="turn", tolerance=0.0)
        alarms += any(one.verdict in ("regressed", "improved") for one in found.values())
    assert 0.025 <= alarms / 400 <= 0.08


def test_error_names_the_comparison():
    """Bad input in one member is refused with the member's name."""
    with pytest.raises(ValueError, match="comparison 'r512': base trial 0 has no samples"):
        compare_family({"r8": ([[1.0]], [[1.0]]), "r512": ([[]], [[1.0]])}, pairing="turn")


def test_each_comparison_can_have_its_own_pairing_and_limits():
    """The comparisons share only the error rate: each equals a plain comparison with that family size."""
    rng = np.random.default_rng(5)
    base = [list(trial) for trial in np.exp(rng.normal(0, 0.3, (6, 1)) + rng.normal(0, 0.1, (6, 9)))]
    turns = [[0.99 * sample for sample in trial] for trial in base]
    blocks = [[1.3 * sample for sample in reversed(trial)] for trial in base]
    found = compare_family(
        {"a": (base, turns), "b": (base, blocks)},
        pairing={"a": "turn", "b": "replicate"},
        tolerance={"a": 0.02, "b": 0.5},
        margin={"a": 0.03, "b": 0.6},
    )
    assert found["a"] == compare_trials(base, turns, pairing="turn", tolerance=0.02, margin=0.03, family=2)
    assert found["b"] == compare_trials(base, blocks, pairing="replicate", tolerance=0.5, margin=0.6, family=2)
    assert [one.verdict for one in found.values()] == ["equivalent", "equivalent"]
