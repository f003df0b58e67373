"""The smallest difference that a comparison could detect, and the replicates that the next one needs.

"No difference found" says nothing without the difference that would have been found. Both numbers follow from the
scatter just seen and the noncentral t (Cohen 1988); they plan the next run and judge nothing in this one. The power of
two one-sided tests at a true ratio of 1 is that of Phillips (1990) in its usual approximation: both tests pass if
neither fails, so each gets half of the permitted misses.
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
MOST_ADVISED = 50
"""No advice exceeds this number of replicates: what needs more is measured in another way, or on a quieter machine."""
# A plan beyond this is no plan.
_MOST_REPLICATES = 10**9


def detectable_log_effect(spread: Spread, rule: VerdictRule) -> float:
    """The smallest log ratio that is called `regressed` with 80 % power: the tolerance, plus what the scatter hides."""
    if spread.standard_error == 0:
        return rule.log_tolerance
    return rule.log_tolerance + noncentrality(spread.df, rule.tail(spread), POWER) * spread.standard_error


def replicates_needed(spread: Spread, rule: VerdictRule, *, may_be_equivalent: bool) -> int | None:
    """Replicates (a side) for a verdict with 80 % power, whichever is true: a slow-down of `margin`, or none.

    A slow-down of the margin must be called `regressed`; no slow-down must be called `equivalent`, where that verdict
    can be had. A margin within the tolerance asks for no alarm, and only the second counts. None if nothing is left to
    ask for, or if no practical number would do.
    """
    sought = rule.log_margin - rule.log_tolerance
    goals: list[tuple[float, float, float]] = []  # what to tell from zero, its tail, its power
    if sought > 0:
        goals.append((sought, rule.tail(spread), POWER))
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

    `sd` is that of one replicate's log ratio. None where the effect is within the tolerance, which no number of
    replicates turns into an alarm, and where no practical number would do.
    Raises ValueError for an effect or sd that is negative or not finite.
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
        distance: from the effect to the limit, on the log scale, above 0.
        sd: of one replicate's log ratio.
        tail: what the interval leaves out on either side.

    None where no practical number would do.
    """
    return _smallest(lambda count: distance * math.sqrt(count) >= noncentrality(count - 1, tail, POWER) * sd)


def sd_interval(sd: float, df: float, *, alpha: float = 0.05) -> tuple[float, float]:
    """The (1 - alpha) interval of a standard deviation of normal values with `df` degrees of freedom (chi-square).

    Raises ValueError for an sd below 0 or not finite, and for df not above 0.
    """
    from scipy.special import chdtri

    checked_number("sd", sd, at_least=0, strictly=False)
    checked_number("df", df, at_least=0, strictly=True)
    return (
        sd * math.sqrt(df / float(chdtri(df, alpha / 2))),
        sd * math.sqrt(df / float(chdtri(df, 1 - alpha / 2))),
    )


def _smallest(enough: Callable[[int], bool]) -> int | None:
    """The smallest count from 2 on that is enough, where every larger one is too; None if no practical one is."""
    high = 2
    while not enough(high):
        high *= 2
        if high > _MOST_REPLICATES:
            return None
    low = high // 2  # not enough, or 1, which never is
    while high - low > 1:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle
    return high
