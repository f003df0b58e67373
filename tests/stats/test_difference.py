"""Tests of comparisons by differences, which may be of negative values or zero."""

import numpy as np
import pytest

from lorameter.stats import VerdictRule, decide, decide_family, estimate_effect, share_scatter
from lorameter.stats.effect import paired_effect

POINTS = VerdictRule(tolerance=0.5, margin=2.0, scale="linear", higher_is_better=True, unit="points")
BASE = [[60.1], [59.8], [60.3], [60.0], [59.9]]


@pytest.mark.parametrize(
    ("shift", "verdict"), [(-3.0, "regressed"), (3.0, "improved"), (0.2, "equivalent"), (-1.9, "regressed")]
)
@pytest.mark.parametrize("level", [0.0, -60.0, 40.0])
def test_a_difference_is_judged_in_its_unit_at_any_level(shift, verdict, level):
    """Fewer points are worse, and the level of the values does not matter, also around zero."""
    noise = [0.02, -0.01, 0.03, -0.02, 0.0]
    base = [[one + level] for (one,) in BASE]
    candidate = [[one + shift + extra] for (one,), extra in zip(base, noise, strict=True)]
    found = decide(estimate_effect(base, candidate, "replicate", "linear"), POINTS)
    assert found.verdict == verdict
    assert found.ratio is None
    assert found.low < found.difference < found.high
    assert found.difference == pytest.approx(shift + 0.004, abs=1e-9)
    assert "points" in found.reason


def test_an_unpaired_difference_is_never_equivalent():
    """As for ratios: it includes what changed between the measurements."""
    assert decide(estimate_effect(BASE, BASE, "none", "linear"), POINTS).verdict == "inconclusive"


def test_a_family_of_differences_keeps_its_error_rate():
    """Of identical variants, any is called different in at most 5 % of the runs, with shared scatter."""
    rng, alarms, runs = np.random.default_rng(5), 0, 800
    rule = VerdictRule(tolerance=0.0, margin=2.0, scale="linear", unit="points")
    for _ in range(runs):
        arms = rng.normal(0.0, 1.0, (6, 4))
        effects = share_scatter({arm: paired_effect(arms[arm] - arms[0], "replicate") for arm in range(1, 6)})
        verdicts = decide_family(effects, dict.fromkeys(effects, rule)).values()
        alarms += any(one.verdict in ("regressed", "improved") for one in verdicts)
    assert alarms / runs < 0.07  # 5 % and three standard errors
