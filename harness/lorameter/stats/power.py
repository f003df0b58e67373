"""Computes the smallest detectable difference of a comparison, and the replicates that the next one needs.

"No difference found" is meaningless without the smallest detectable difference. Both numbers follow from the observed
scatter and the noncentral t (Cohen 1988); they plan the next run and do not affect the verdicts of this one. The power
of two one-sided tests at a true ratio of 1 is the usual approximation of Phillips (1990): both tests must pass, so each
gets half of the permitted misses.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lorameter.stats.intervals import noncentrality
from lorameter.stats.samples import checked_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorameter.stats.effect import Spread
    from lorameter.stats.verdict import VerdictRule

POWER = 0.8
MAX_ADVISED = 50
"""Maximum number of replicates that is advised: beyond it, another method or a quieter machine is needed."""
# Maximum number of replicates that is computed.
_MAX_REPLICATES = 10**9


def detectable_log_effect(spread: Spread, rule: VerdictRule) -> float:
    """The smallest log ratio that is called `regressed` with 80 % power: the tolerance plus a term for the scatter."""
    if spread.standard_error == 0:
        return rule.log_tolerance
    return rule.log_tolerance + noncentrality(spread.df, rule.tail(spread), POWER) * spread.standard_error


def replicates_needed(spread: Spread, rule: VerdictRule, *, may_be_equivalent: bool) -> int | None:
    """Replicates (per side) for a verdict with 80 % power, both for a slow-down of `margin` and for no slow-down.

    A slow-down of the margin must be called `regressed`; no slow-down must be called `equivalent`, if that verdict is
    possible. If the margin is within the tolerance, only the second goal counts. None if there is no goal, or if no
    practical number suffices.
    """
    gap = rule.log_margin - rule.log_tolerance
    goals: list[tuple[float, float, float]] = []  # what to distinguish from zero, its tail, its power
    if gap > 0:
        goals.append((gap, rule.tail(spread), POWER))
    if may_be_equivalent:
        goals.append((rule.log_margin, rule.alpha, (1 + POWER) / 2))
    if not goals:
        return None

    def enough(replicates: int) -> bool:
        df = spread.prior_df + spread.df_per_replicate * (replicates - 1)
        return all(
            distance * math.sqrt(replicates) >= noncentrality(df, tail, power) * spread.sd
            for distance, tail, power in goals
        )

    return _smallest(enough)


def replicates_to_see(effect: float, sd: float, *, tolerance: float, alpha: float = 0.05) -> int | None:
    """Paired replicates after which a slow-down of `effect` (a fraction) is called `regressed` with 80 % power.

    `sd` is the standard deviation of one replicate's log ratio. None if the effect is within the tolerance, so that it
    is never an alarm, and if no practical number suffices. Raises ValueError for an effect or sd that is negative or
    not finite.
    """
    checked_number("effect", effect, at_least=0, strictly=True)
    checked_number("sd", sd, at_least=0, strictly=False)
    distance = math.log1p(effect) - math.log1p(tolerance)
    if distance <= 0:
        return None
    return replicates_to_clear(distance, sd, alpha / 2)


def replicates_to_clear(distance: float, sd: float, tail: float) -> int | None:
    """Paired replicates after which an effect's interval clears a limit with 80 % power.

    Args:
        distance: distance from the effect to the limit, on the log scale, above 0.
        sd: standard deviation of one replicate's log ratio.
        tail: error rate on each side of the interval.

    None if no practical number suffices.
    """
    return _smallest(lambda count: distance * math.sqrt(count) >= noncentrality(count - 1, tail, POWER) * sd)


def sd_interval(sd: float, df: float, *, alpha: float = 0.05) -> tuple[float, float]:
    """The (1 - alpha) interval of a standard deviation of normal values with `df` degrees of freedom (chi-square)."""
    from scipy.special import chdtri

    return (
        sd * math.sqrt(df / float(chdtri(df, alpha / 2))),
        sd * math.sqrt(df / float(chdtri(df, 1 - alpha / 2))),
    )


def _smallest(enough: Callable[[int], bool]) -> int | None:
    """The smallest count from 2 on that is enough, if every larger one is enough too; None if no practical count is."""
    high = 2
    while not enough(high):
        high *= 2
        if high > _MAX_REPLICATES:
            return None
    low = high // 2  # not enough, or 1, which never is
    while high - low > 1:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle
    return high
