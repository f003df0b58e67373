"""Whether to go on warming up: compiled kernels, filled caches, a settled clock.

A fixed number of discarded steps is either too short for a compiled model or wasteful for an eager one, so the
question is answered after each step, and must be cheap.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from lorameter.stats.samples import checked_number

if TYPE_CHECKING:
    from collections.abc import Sequence


WINDOW = 3
"""Steps that must show no more downward trend before a warm-up ends."""


def is_steady(samples: Sequence[float], window: int = WINDOW, *, tolerance: float = 0.02) -> bool:
    """Whether to stop warming up: the last `window` steps are no longer faster than the `window` before them.

    True when the median log time of the last `window` steps is at most `tolerance` (a fraction) below that of the
    preceding window; False while there are fewer than two windows. Getting slower is no reason to go on. Medians let a
    single slow step pass. Costs O(window), so it may be asked after each step. No allowance is made for noise: it
    delays the answer by a few steps, and lets a decay pass that is smaller than the noise of a window's median.

    Raises ValueError for window < 1, and for samples in the two windows that are not finite and above zero.
    """
    if window < 1:
        raise ValueError(f"window is {window}: a trend needs at least one step a window")
    allowed = math.log1p(checked_number("tolerance", tolerance, at_least=0, strictly=False))
    if len(samples) < 2 * window:
        return False
    first = len(samples) - 2 * window
    return _level(samples, first, window) - _level(samples, first + window, window) <= allowed


def is_warm(samples: Sequence[float], least: int, most: int) -> bool:
    """Whether a warm-up is over: its steps are steady and at least `least`, or there were `most` of them."""
    return len(samples) >= most or (len(samples) >= least and is_steady(samples))


def _level(samples: Sequence[float], first: int, window: int) -> float:
    """The median log time of so many steps from `first` on."""
    taken = enumerate(samples[first : first + window], first)
    checked = (checked_number(f"samples sample {index}", one, at_least=0, strictly=True) for index, one in taken)
    return statistics.median(math.log(one) for one in checked)
