"""When to stop measuring: when the intervals are narrow enough, never when they are significant.

Looking after every replicate and stopping at the first alarm raised the false alarms on identical code from 4.6 to
20.7 %. The width of an interval says nothing about where its centre lies, so stopping on it leaves the error rate
nearly as it is (Stein 1945; Kelley, Maxwell & Rausch 2003 call it accuracy in parameter estimation), if a few
replicates are taken in any case: the first two or three can agree by luck.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from harness.stats.samples import checked_number

if TYPE_CHECKING:
    from collections.abc import Iterable

    from harness.stats.verdict import Comparison


def is_precise(comparisons: Iterable[Comparison], *, half_width: float, least_replicates: int = 5) -> bool:
    """Whether every comparison has its replicates and an interval no wider than ± `half_width` (a fraction).

    Pass comparisons whose intervals are all of one level (`compare_trials` with a fixed `family`): Holm's narrow with
    every comparison that is decided, and would let significance in again. False of no comparison, and where an interval
    has no end: nothing was measured that could be precise.
    Raises ValueError for half_width <= 0 and for least_replicates < 2.
    """
    limit = checked_number("half_width", half_width, at_least=0, strictly=True)
    checked_number("least_replicates", least_replicates, at_least=2, strictly=False)
    widths = [relative_half_width(one) if one.replicates >= least_replicates else None for one in comparisons]
    return bool(widths) and all(width is not None and width <= limit for width in widths)


def relative_half_width(comparison: Comparison) -> float | None:
    """Half the interval of the log ratio, as a fraction: 0.02 if it reaches from ratio/1.02 to ratio*1.02.

    None where an end is missing or zero, which is infinitely far off on the log scale.
    """
    if not comparison.low or comparison.high is None:
        return None
    half = (math.log(comparison.high) - math.log(comparison.low)) / 2
    return math.expm1(half)
