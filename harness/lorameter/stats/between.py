"""Estimates how much groups differ beyond the scatter within each group: a variance component.

Group means scatter even if all groups are equal, so the expected chance variance is subtracted from the variance of the
means (one-way random effects; for unequal group sizes with their harmonic mean, Thomas & Hultquist 1978). The interval
is that of Williams (1962, "A confidence interval for variance components"), which covers the true value in at least (1
- alpha) of all cases for normal values.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lorameter.stats.power import sd_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Between:
    """A standard deviation between groups, in the unit of the values, with its (1 - alpha) interval."""

    sd: float
    low: float
    high: float
    alone: bool
    """Whether the scatter within groups is excluded; with one value a group, it is included by an unknown amount."""


def sd_between(groups: Sequence[Sequence[float]], *, alpha: float = 0.05) -> Between:
    """The standard deviation between groups, from the values measured in each.

    Raises ValueError for fewer than two groups, and for an empty group.
    """
    if len(groups) < 2 or not all(groups):
        raise ValueError("two groups or more are needed, each with a value")
    seen = statistics.variance(statistics.fmean(values) for values in groups)
    of_groups, of_values = len(groups) - 1, sum(len(values) - 1 for values in groups)
    if not of_values:
        low, high = sd_interval(math.sqrt(seen), of_groups, alpha=alpha)
        return Between(sd=math.sqrt(seen), low=low, high=high, alone=False)
    from scipy.special import chdtri, fdtri

    within = sum((len(values) - 1) * statistics.variance(values) for values in groups if len(values) > 1) / of_values
    sampling_variance = within / statistics.harmonic_mean([len(values) for values in groups])

    def end(tail: float) -> float:
        above = seen - sampling_variance * float(fdtri(of_groups, of_values, 1 - tail))
        return math.sqrt(max(0.0, of_groups * above / float(chdtri(of_groups, tail))))

    sd = math.sqrt(max(0.0, seen - sampling_variance))
    return Between(sd=sd, low=end(alpha / 2), high=end(1 - alpha / 2), alone=True)
