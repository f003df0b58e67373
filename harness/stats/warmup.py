"""Whether to go on warming up: compiled kernels, filled caches, a settled clock.

A fixed number of discarded steps is either too short for a compiled model or wasteful for an eager one, so the
question is asked after each step, and must be cheap.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from harness.stats.samples import checked_number

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

    Raises ValueError for window < 2, and for samples in the two windows that are not finite and above zero.
    """
    if window < 2:
        raise ValueError(f"window is {window}: a trend needs at least 2 steps a window")
    allowed = math.log1p(checked_number("tolerance", tolerance, at_least=0, strictly=False))
    if len(samples) < 2 * window:
        return False
    recent = samples[-2 * window :]
    for index, sample in enumerate(recent, len(samples) - 2 * window):
        checked_number(f"samples sample {index}", sample, at_least=0, strictly=True)
    before = statistics.median(math.log(sample) for sample in recent[:window])
    after = statistics.median(math.log(sample) for sample in recent[window:])
    return before - after <= allowed
