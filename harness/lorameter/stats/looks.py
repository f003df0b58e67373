"""Planned looks: a run may be judged after several numbers of replicates, and end as soon as it is decided.

Judging after each replicate at the usual level and stopping at the first difference gave 8.7 % false alarms instead of
2.5 %. Here the looks are planned, and every look has one stricter level, such that all looks together keep the rate
(Pocock 1977, Biometrika 64, 191–199). The level is exact for normal values with a known variance, and is applied to
Student's t at each look, as Jennison & Turnbull advise ("Group Sequential Methods", 2000, section 4.4); with the
product's own rule (shared scatter, Dunnett, Holm, equivalence) the rates are simulated (docs/method.md).

The intervals of all looks at this level hold the truth at once with the usual coverage (repeated confidence intervals:
Jennison & Turnbull 1989, J. R. Stat. Soc. B 51), so an interval is valid whenever and for whatever reason the run ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import TypeVar

from lorameter.stats.verdict import Comparison

K = TypeVar("K")

LOOKS = (3, 4, 5, 6, 8, 10, 12)
"""Numbers of replicates after which a run is judged: each later one adds a fifth or more."""
_POINTS = 80
"""Points of the quadrature; the level has six digits."""


def planned_looks(replicates: int) -> tuple[int, ...]:
    """The numbers of replicates after which a run of at most `replicates` is judged; the last one is always among
    them."""
    return (*(look for look in LOOKS if look < replicates), replicates)


def are_decided(comparisons: Collection[Comparison]) -> bool:
    """Whether there are valid comparisons, and none of them is inconclusive."""
    valid = [one for one in comparisons if one.verdict != "invalid"]
    return bool(valid) and all(one.verdict != "inconclusive" for one in valid)


def judge_at_looks(
    judge: Callable[[int], Mapping[K, Comparison]], looks: tuple[int, ...]
) -> tuple[int, Mapping[K, Comparison]]:
    """The look at which a run ends, and its comparisons; `judge` judges a number of replicates at the level of a
    look."""
    for look in looks[:-1]:
        if are_decided((found := judge(look)).values()):
            return look, found
    return looks[-1], judge(looks[-1])


@lru_cache
def look_level(alpha: float, looks: tuple[int, ...]) -> float:
    """The two-sided error rate of each look, with which all `looks` (numbers of replicates, ascending) together have
    the rate `alpha`."""
    from scipy.special import ndtr, ndtri

    low, high = -float(ndtri(alpha / 2)), -float(ndtri(alpha / 2 / len(looks)))  # one look, and Bonferroni's bound
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _crossing(middle, looks) > alpha else (low, middle)
    return 2 * float(ndtr(-high))


def _crossing(limit: float, looks: tuple[int, ...]) -> float:
    """The probability that the standardised sum of normal values is beyond ± `limit` at one of the looks, by the
    recursion of Armitage, McPherson & Rowe (1969, J. R. Stat. Soc. A 132)."""
    import numpy as np

    points, weights = np.polynomial.legendre.leggauss(_POINTS)
    sums, mass = np.zeros(1), np.ones(1)
    for before, look in zip((0, *looks), looks, strict=False):
        reach, sd = limit * math.sqrt(look), math.sqrt(look - before)
        inside = reach * points
        density = np.exp(-(((inside[:, None] - sums) / sd) ** 2) / 2) / (sd * math.sqrt(2 * math.pi))
        sums, mass = inside, (density @ mass) * reach * weights
    return 1 - float(mass.sum())
