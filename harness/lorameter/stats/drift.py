"""Detects level changes in timed steps: a throttled clock, a memory leak, or other work that started or ended.

The steady state of a series is found as in Barrett et al. (2017, "Virtual machine warmup blows hot and cold"), from
change points in the log step times: it is the level of the last segment, if enough of the series is at this level. The
change points come from binary segmentation (Scott & Knott 1974) on shifts of the mean, with a penalty of three log n
per change, a BIC-type criterion (Yao 1988, made stricter because step times are not quite independent). The unit of
cost is the noise between neighbours, so that a drift or a shift does not inflate it.

Decides when a warm-up ends: kernels are compiled, caches filled, and the clock is stable.

A fixed number of discarded steps is either too small for a compiled model or wasteful for an eager one, so the test
runs after each step and must be cheap.
"""

from __future__ import annotations

import itertools
import math
import statistics
from typing import TYPE_CHECKING

from lorameter.stats.samples import checked_number, checked_samples

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy import float64, intp
    from numpy.typing import NDArray


_MIN_SEGMENT = 3
_PENALTY_PER_LOG_N = 3.0
# Minimum noise of a thousandth, because with coarse clocks most differences are exactly zero.
_NOISE_FLOOR = 1e-3
# Converts the median absolute difference of neighbours to a standard deviation of normal values: 1.4826, and a factor
# for the difference of two steps.
_MAD_TO_SD = 1.4826 / math.sqrt(2)
# Barrett et al. require the last quarter of a series to be steady; and most steps after its start must be at its level.
_MIN_STEADY_SHARE = 0.25
_MIN_SHARE_AT_LEVEL = 0.75
_AT_ONCE = 1000
"""Number of series that are processed together: a run of this many series with 200 steps takes a few megabytes."""


def drifting(trials: Sequence[Sequence[float]], *, tolerance: float) -> list[bool]:
    """For each series of step times, whether it becomes slower, or has no steady level.

    Levels differ if the difference exceeds `tolerance` (a fraction) and the noise. There is no steady level if the last
    one covers less than a quarter of the steps, or if more than a quarter of the steps after its start are at another
    level. Slower first steps, a temporary burst and a single slow step do not count as drift; with fewer than six steps
    there is none. The false-positive rate on stationary noise is about one in 25 series at most.

    Raises ValueError without samples, for samples that are not finite and above zero, and for tolerance < 0.
    """
    import numpy as np

    allowed = math.log1p(checked_number("tolerance", tolerance, at_least=0, strictly=False))
    series = [checked_samples(f"trial {index}", trial, positive=True) for index, trial in enumerate(trials)]
    found = [False] * len(series)
    by_length: dict[int, list[int]] = {}
    for index, one in enumerate(series):
        if one.size >= 2 * _MIN_SEGMENT:
            by_length.setdefault(one.size, []).append(index)
    for alike in by_length.values():
        for start in range(0, len(alike), _AT_ONCE):
            some = alike[start : start + _AT_ONCE]
            log_times = np.log(np.stack([series[index] for index in some]))
            for index, drifted in zip(some, _drifting(log_times, allowed), strict=True):
                found[index] = drifted
    return found


def _drifting(log_times: NDArray[float64], allowed: float) -> list[bool]:
    """The drift of series of one length, one per row. Most have a single level, which is tested for all of them at
    once."""
    import numpy as np

    noise = np.maximum(np.median(np.abs(np.diff(log_times, axis=1)), axis=1) * _MAD_TO_SD, _NOISE_FLOOR)
    despiked = _median_filter(log_times)
    penalty = _PENALTY_PER_LOG_N * math.log(log_times.shape[1])
    _, gains = _best_splits(despiked / noise[:, None])
    return [
        bool(gain > penalty) and _finds_no_level(row, float(sd), allowed, penalty)
        for row, sd, gain in zip(despiked, noise, gains, strict=True)
    ]


def _finds_no_level(despiked: NDArray[float64], noise: float, allowed: float, penalty: float) -> bool:
    """Whether a series with level changes becomes slower, or has no steady level."""
    count = despiked.size
    starts = _segment_starts(despiked / noise, penalty)
    segments = [despiked[start:end] for start, end in itertools.pairwise([*starts, count])]
    levels, last = [float(segment.mean()) for segment in segments], segments[-1]
    # Segments that are not adjacent are compared by the same criterion as neighbours, and must differ by more than the
    # tolerance.
    steady = [
        abs(level - levels[-1]) <= max(allowed, noise * math.sqrt(penalty * (1 / segment.size + 1 / last.size)))
        for level, segment in zip(levels, segments, strict=True)
    ]
    first = steady.index(True)
    at_level = sum(segment.size for segment, same in zip(segments, steady, strict=True) if same)
    if at_level < _MIN_STEADY_SHARE * count or at_level < _MIN_SHARE_AT_LEVEL * (count - starts[first]):
        return True
    return any(level < levels[-1] for level in levels[:first])


def _median_filter(log_times: NDArray[float64]) -> NDArray[float64]:
    """A running median of three: it removes single slow steps, preserves the positions of shifts, and keeps the first
    step (compilation)."""
    import numpy as np

    despiked = log_times.copy()
    left, middle, right = log_times[:, :-2], log_times[:, 1:-1], log_times[:, 2:]
    despiked[:, 1:-1] = np.maximum(np.minimum(left, middle), np.minimum(np.maximum(left, middle), right))
    despiked[:, -1] = despiked[:, -2]
    return despiked


def _segment_starts(values: NDArray[float64], penalty: float) -> list[int]:
    """Start indices of the segments of constant mean, in order, beginning with 0; `values` is in units of the noise."""
    starts = [0]
    pending = [(0, values.size)]
    while pending:
        start, end = pending.pop()
        if end - start < 2 * _MIN_SEGMENT:
            continue
        splits, gains = _best_splits(values[None, start:end])
        if gains[0] > penalty:
            split = start + int(splits[0])
            starts.append(split)
            pending += [(start, split), (split, end)]
    return sorted(starts)


def _best_splits(values: NDArray[float64]) -> tuple[NDArray[intp], NDArray[float64]]:
    """For each row, the split that reduces the squared error most, and the reduction."""
    import numpy as np

    count = values.shape[1]
    sums = np.cumsum(values - values.mean(axis=1, keepdims=True), axis=1)
    splits = np.arange(_MIN_SEGMENT, count - _MIN_SEGMENT + 1)
    # With a total of zero, the gain of a split after k of n values is S_k^2 n / (k (n - k)).
    gains = sums[:, splits - 1] ** 2 * count / (splits * (count - splits))
    best = gains.argmax(axis=1)
    return splits[best], np.take_along_axis(gains, best[:, None], axis=1)[:, 0]


WINDOW = 3
"""Number of steps without a downward trend that ends a warm-up."""


def is_steady(samples: Sequence[float], window: int = WINDOW, *, tolerance: float = 0.02) -> bool:
    """Whether step times are steady: the last `window` steps are no longer faster than the `window` steps before them.

    True when the median log time of the last `window` steps is at most `tolerance` (a fraction) below that of the
    preceding window; False while there are fewer than two windows. An upward trend does not prolong the warm-up.
    Medians ignore a single slow step. The cost is O(window), so the test may run after each step. Noise is not
    modelled: it delays the end by a few steps, and hides a decay that is smaller than the noise of a window's median.

    Raises ValueError for samples in the two windows that are not above zero.
    """
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
    return statistics.median(map(math.log, samples[first : first + window]))
