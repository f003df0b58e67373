"""The verdict of a comparison: its values, and the rule that decides it.

`regressed` and `improved` require an interval wholly beyond the tolerance, not just a difference from zero: a real
slow-down of 0.2 % is not worth an alarm. `equivalent` is a finding of its own, by two one-sided tests (Schuirmann
1987): the (1 - 2 alpha) interval lies inside the margin. Everything else is `inconclusive`: the absence of a detected
difference does not prove equality.

Both limits are ratios and symmetric on the log scale: a tolerance of 1 % means above 1.01 and below 1/1.01 (0.9901), a
margin of 5 % means between 1/1.05 and 1.05. So a verdict does not depend on which side is called the base.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lorameter.stats.estimate import dunnett_tail
from lorameter.stats.samples import checked_alpha, checked_number

if TYPE_CHECKING:
    from lorameter.stats.effect import Spread

Verdict = Literal["improved", "regressed", "equivalent", "inconclusive", "invalid", "no_baseline", "not_comparable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A candidate compared with a base. No value is NaN or infinite: a missing value is None, and `reason` says why."""

    verdict: Verdict
    ratio: float | None
    """Candidate over base: 1.0 = equal, above = worse. None only if the base is zero (bytes)."""
    low: float | None
    """Lower end of the (1 - alpha/family) interval of the ratio; None with one replicate."""
    high: float | None
    """Upper end; None with one replicate, or if it exceeds the range of a float."""
    reason: str
    """One sentence for users that explains the verdict, with the numbers."""
    replicates: int
    """Pairs of trials, or the smaller number of trials where the sides are not paired."""
    replicates_needed: int | None
    """Replicates in total (not additional ones) for 80 % power at the observed scatter; None if no number suffices."""
    mde80: float | None
    """Smallest slow-down (fraction) that this many replicates would have called `regressed` with 80 % power."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictRule:
    """The limits of one comparison. Raises ValueError that names an invalid limit."""

    tolerance: float = 0.01
    """Smallest slow-down worth an alarm, a fraction >= 0."""
    margin: float = 0.05
    """Two values within it count as equal, a fraction > 0."""
    alpha: float = 0.05
    """Two-sided error rate of the interval, before `family`; each of the two one-sided equivalence tests has it too."""
    family: int = 1
    """Comparisons that share `alpha`."""

    def __post_init__(self) -> None:
        checked_number("tolerance", self.tolerance, at_least=0, strictly=False)
        checked_number("margin", self.margin, at_least=0, strictly=True)
        checked_alpha(self.alpha)
        checked_number("family", self.family, at_least=1, strictly=False)

    def tail(self, spread: Spread) -> float:
        """Error rate on either side of the interval: Bonferroni's, or Dunnett's where the scatter is shared."""
        if spread.shared_by:
            return dunnett_tail(spread.df, self.alpha, self.family)
        return self.alpha / self.family / 2

    @property
    def log_tolerance(self) -> float:
        """The tolerance on the log scale."""
        return math.log1p(self.tolerance)

    @property
    def log_margin(self) -> float:
        """The margin on the log scale."""
        return math.log1p(self.margin)

    def judge(self, log_ratio: float, half_width: float, equivalence_half_width: float) -> Verdict:
        """The verdict on a log ratio, from the half-widths of its (1 - alpha/family) and (1 - 2 alpha) intervals.

        `family` does not widen the second interval: a false `equivalent` is an error of one comparison, not of the
        family.
        """
        if log_ratio - half_width > self.log_tolerance:
            return "regressed"
        if log_ratio + half_width < -self.log_tolerance:
            return "improved"
        if abs(log_ratio) + equivalence_half_width < self.log_margin:
            return "equivalent"
        return "inconclusive"
