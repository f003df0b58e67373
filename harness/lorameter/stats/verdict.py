"""The verdict of a comparison, the rule that decides it, the smallest difference that it can detect, and the replicates
that the next one needs.

`regressed` and `improved` require an interval wholly beyond the tolerance, not just a difference from zero: a real
slow-down of 0.2 % is not worth an alarm. `equivalent` is a finding of its own, by two one-sided tests (Schuirmann
1987): the (1 - 2 alpha) interval lies inside the margin. Everything else is `inconclusive`: the absence of a detected
difference does not prove equality.

Both limits are ratios and symmetric on the log scale: a tolerance of 1 % means above 1.01 and below 1/1.01 (0.9901), a
margin of 5 % means between 1/1.05 and 1.05. So a verdict does not depend on which side is called the base.

"No difference found" is meaningless without the smallest detectable difference. It and the number of replicates follow
from the observed scatter and the noncentral t (Cohen 1988); they plan the next run and do not affect the verdicts of
this one. The power of two one-sided tests at a true ratio of 1 is the usual approximation of Phillips (1990): both
tests must pass, so each gets half of the permitted misses.

A measurement may stop when the intervals are narrow enough, but never because of a significant result. Testing after
every replicate and stopping at the first alarm raised the false alarms on identical code from 4.6 to 20.7 %. The width
of an interval says nothing about where its centre lies, so stopping on it leaves the error rate nearly as it is (Stein
1945; Kelley, Maxwell & Rausch 2003 call it accuracy in parameter estimation), if there is a minimum number of
replicates: the first two or three can agree by chance.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from lorameter.stats.effect import Scale, Spread, dunnett_tail
from lorameter.stats.intervals import noncentrality

Verdict = Literal["improved", "regressed", "equivalent", "inconclusive", "invalid", "no_baseline", "not_comparable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A candidate compared with a base. No value is NaN or infinite: a missing value is None, and `reason` says why."""

    verdict: Verdict
    ratio: float | None = None
    """Candidate over base: 1.0 = equal, above = worse. None if the base is zero (bytes), or if nothing was compared."""
    difference: float | None = None
    """Of a metric that is compared by differences, instead of a ratio: candidate minus base, in the metric's unit."""
    share: float | None = None
    """Of losses, instead of a ratio: the candidate's part of the base's gain; 1.0 = equal, below = worse."""
    low: float | None = None
    """Lower end of the (1 - alpha/family) interval of the ratio, difference or share; None with one replicate."""
    high: float | None = None
    """Upper end; None with one replicate, or if it exceeds the range of a float."""
    reason: str
    """One sentence for users that explains the verdict, with the numbers."""
    replicates: int = 0
    """Pairs of trials, or the smaller number of trials where the sides are not paired."""
    replicates_needed: int | None = None
    """Replicates in total (not additional ones) for 80 % power at the observed scatter; None if no number suffices."""
    mde80: float | None = None
    """Smallest slow-down (a fraction; of a difference, in its unit) that this many replicates would have called
    `regressed` with 80 % power."""

    @property
    def value(self) -> float | None:
        """The ratio, the difference or the share; None if nothing was compared."""
        return next((one for one in (self.share, self.difference, self.ratio) if one is not None), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictRule:
    """The limits of one comparison: fractions of a ratio or, on the linear scale, in the metric's unit."""

    tolerance: float = 0.01
    """Smallest slow-down worth an alarm, >= 0."""
    margin: float = 0.05
    """Two values within it count as equal, > 0."""
    scale: Scale = "log"
    higher_is_better: bool = False
    """Of a difference: a value below zero is worse. Ratios are inverted before they are compared."""
    unit: str = ""
    """Of a difference, for the reason."""
    alpha: float = 0.05
    """Two-sided error rate of the interval, before `family`; each of the two one-sided equivalence tests has it too."""
    family: int = 1
    """Comparisons that share `alpha`."""

    def tail(self, spread: Spread) -> float:
        """Error rate on either side of the interval: Bonferroni's, or Dunnett's where the scatter is shared."""
        if spread.shared_by:
            return dunnett_tail(spread.df, self.alpha, self.family)
        return self.alpha / self.family / 2

    @property
    def tolerance_limit(self) -> float:
        """The tolerance on the scale of the comparison."""
        return math.log1p(self.tolerance) if self.scale == "log" else self.tolerance

    @property
    def margin_limit(self) -> float:
        """The margin on the scale of the comparison."""
        return math.log1p(self.margin) if self.scale == "log" else self.margin

    def judge(self, log_ratio: float, half_width: float, equivalence_half_width: float) -> Verdict:
        """The verdict on a log ratio or difference, from the half-widths of its (1 - alpha/family) and (1 - 2 alpha)
        intervals.

        `family` does not widen the second interval: a false `equivalent` is an error of one comparison, not of the
        family.
        """
        worse = -log_ratio if self.higher_is_better else log_ratio
        if worse - half_width > self.tolerance_limit:
            return "regressed"
        if worse + half_width < -self.tolerance_limit:
            return "improved"
        if abs(log_ratio) + equivalence_half_width < self.margin_limit:
            return "equivalent"
        return "inconclusive"


POWER = 0.8
MAX_ADVISED = 50
"""Maximum number of replicates that is advised: beyond it, another method or a quieter machine is needed."""
# Maximum number of replicates that is computed.
_MAX_REPLICATES = 10**9


def detectable_effect(spread: Spread, rule: VerdictRule) -> float:
    """The smallest log ratio that is called `regressed` with 80 % power: the tolerance plus a term for the scatter."""
    if spread.standard_error == 0:
        return rule.tolerance_limit
    return rule.tolerance_limit + noncentrality(spread.df, rule.tail(spread), POWER) * spread.standard_error


def replicates_needed(spread: Spread, rule: VerdictRule, *, may_be_equivalent: bool) -> int | None:
    """Replicates (per side) for a verdict with 80 % power, both for a slow-down of `margin` and for no slow-down.

    A slow-down of the margin must be called `regressed`; no slow-down must be called `equivalent`, if that verdict is
    possible. If the margin is within the tolerance, only the second goal counts. None if there is no goal, or if no
    practical number suffices.
    """
    gap = rule.margin_limit - rule.tolerance_limit
    goals: list[tuple[float, float, float]] = []  # what to distinguish from zero, its tail, its power
    if gap > 0:
        goals.append((gap, rule.tail(spread), POWER))
    if may_be_equivalent:
        goals.append((rule.margin_limit, rule.alpha, (1 + POWER) / 2))
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
    is never an alarm, and if no practical number suffices.
    """
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


def _smallest(enough: Callable[[int], bool]) -> int | None:
    """The smallest count from 2 on that is enough, if every larger one is enough too; None if no practical count is."""
    high = 2
    while not enough(high):
        high *= 2
        if high > _MAX_REPLICATES:
            return None
    return bisect.bisect_left(range(high), True, lo=high // 2 + 1, key=enough)  # half of it is not enough, or is 1


def is_precise(comparisons: Iterable[Comparison], *, half_width: float, least_replicates: int = 5) -> bool:
    """Whether every comparison has its replicates and an interval no wider than ± `half_width` (a fraction).

    Pass comparisons whose intervals have one fixed level (`compare_trials` with a fixed `family`): Holm's intervals
    narrow with every decided comparison, so that stopping would depend on significance again. Returns False without
    comparisons, and if an interval has no end.
    """
    widths = [relative_half_width(one) if one.replicates >= least_replicates else None for one in comparisons]
    return bool(widths) and all(width is not None and width <= half_width for width in widths)


def relative_half_width(comparison: Comparison) -> float | None:
    """Half the interval of the log ratio, as a fraction: 0.02 if it reaches from ratio/1.02 to ratio*1.02.

    None if an end is missing or zero, which is infinitely far away on the log scale.
    """
    if not comparison.low or comparison.high is None:
        return None
    half = (math.log(comparison.high) - math.log(comparison.low)) / 2
    return math.expm1(half)
