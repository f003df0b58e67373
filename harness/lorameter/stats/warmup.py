"""Decides when a warm-up ends: kernels are compiled, caches filled, and the clock is stable.

A fixed number of discarded steps is either too small for a compiled model or wasteful for an eager one, so the test
runs after each step and must be cheap.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from lorameter.stats.samples import checked_number

if TYPE_CHECKING:
    from collections.abc import Sequence


WINDOW = 3
"""Number of steps without a downward trend that ends a warm-up."""


def is_steady(samples: Sequence[float], window: int = WINDOW, *, tolerance: float = 0.02) -> bool:
    """Whether step times are steady: the last `window` steps are no longer faster than the `window` steps before them.

    True when the median log time of the last `window` steps is at most `tolerance` (a fraction) below that of the
    preceding window; False while there are fewer than two windows. An upward trend does not prolong the warm-up.
    Medians ignore a single slow step. The cost is O(window), so the test may run after each step. Noise is not
    modelled: it delays the end by a few steps, and hides a decay that is smaller than the noise of a window's median.

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
    """Whether a warm-up has ended: it has at least `least` steps and is steady, or it has `most` steps."""
    return len(samples) >= most or (len(samples) >= least and is_steady(samples))


def _level(samples: Sequence[float], first: int, window: int) -> float:
    """The median log time of `window` steps from `first` on."""
    taken = enumerate(samples[first : first + window], first)
    checked = (checked_number(f"samples sample {index}", one, at_least=0, strictly=True) for index, one in taken)
    return statistics.median(math.log(one) for one in checked)
