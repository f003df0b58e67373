"""Whether to go on warming up: compiled kernels, filled caches, a settled clock.

A fixed number of discarded steps is either too short for a compiled model or wasteful for an eager one, so the
question is asked after each step, and must be cheap.
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
TOGETHER, ALONE = 0.05, 0.15
"""By how much the steps of several trials may be above their last ones where these tell others how long to warm up: of
all of them together, and of one."""


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


def steady_after(samples: Sequence[float], window: int = WINDOW, *, tolerance: float = 0.02) -> int:
    """After how many steps of a warm-up that was long enough its steps were as fast as its last ones: the fewest whose
    next `window` steps have a median log time at most `tolerance` above that of the last `window`.

    Of fewer than two windows the windows are halves. Raises ValueError as `is_steady` does.
    """
    allowed = math.log1p(checked_number("tolerance", tolerance, at_least=0, strictly=False))
    window = _window_of(samples, window)
    last = max(0, len(samples) - window)
    settled = _level(samples, last, window)
    return next((first for first in range(last) if _level(samples, first, window) - settled <= allowed), last)


def steady_together(
    trials: Sequence[Sequence[float]], *, tolerance: float = TOGETHER, tolerance_alone: float = ALONE
) -> int:
    """After how many steps several trials were as fast as at the ends of their warm-ups: all of them together, by the
    geometric mean of what their steps took over their last ones, within `tolerance`, and each within `tolerance_alone`.
    A trial alone is too noisy to be held to the first: the noisiest would tell all others how long to warm up.

    Raises ValueError as `is_steady` does, and for no trials at all.
    """
    if not trials:
        raise ValueError("no trials to warm up")
    alone = max(steady_after(times, tolerance=tolerance_alone) for times in trials)
    shared = min(len(times) for times in trials)
    ends = [_level(times, len(times) - last, last) for times in trials for last in (_window_of(times, WINDOW),)]
    excess = [
        statistics.fmean(math.log(times[step]) - end for times, end in zip(trials, ends, strict=True))
        for step in range(shared)
    ]
    allowed = math.log1p(checked_number("tolerance", tolerance, at_least=0, strictly=False))
    return max(alone, next((step for step, found in enumerate(excess) if found <= allowed), shared))


def _window_of(samples: Sequence[float], window: int) -> int:
    """Of fewer than two windows the half."""
    return min(window, max(1, len(samples) // 2))


def _level(samples: Sequence[float], first: int, window: int) -> float:
    """The median log time of so many steps from `first` on."""
    taken = enumerate(samples[first : first + window], first)
    checked = (checked_number(f"samples sample {index}", one, at_least=0, strictly=True) for index, one in taken)
    return statistics.median(math.log(one) for one in checked)
