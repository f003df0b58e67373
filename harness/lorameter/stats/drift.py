"""Whether timed steps change their level: a clock that throttles, a leak, a neighbour that came or went.

The steady state of a series is found as in Barrett et al. (2017, "Virtual machine warmup blows hot and cold"), from
change points in the log step times: the level of the last segment, if enough of the series is at it. The change points
come from binary segmentation (Scott & Knott 1974) on shifts of the mean, with a penalty of three log n a change, as a
BIC-type criterion asks (Yao 1988, made stricter, because step times are not quite independent). The unit of cost is the
noise between neighbours, so a slow drift or a step cannot hide itself by inflating the variance.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from lorameter.stats.samples import checked_number, checked_samples

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy import float64, intp
    from numpy.typing import NDArray

_LEAST_SEGMENT = 3
_PENALTY_PER_LOG_N = 3.0
# Steps are not distinguished below a thousandth: clocks that tick coarsely make most differences exactly zero.
_NOISE_FLOOR = 1e-3
# From the median absolute difference of neighbours to their standard deviation, if normal: 1.4826, and two steps
# differ.
_MAD_TO_SD = 1.4826 / math.sqrt(2)
# Barrett et al. ask the last quarter of a series to be steady; and what follows its start must be mostly at its level.
_LEAST_STEADY_SHARE = 0.25
_LEAST_SHARE_AT_LEVEL = 0.75
_AT_ONCE = 1000
"""Series that are looked at together: as many as a run of 200 steps each holds in a few megabytes."""


def drifting(trials: Sequence[Sequence[float]], *, tolerance: float) -> list[bool]:
    """Of each series of step times whether it gets slower, or finds no steady level.

    Levels differ if they do by more than `tolerance` (a fraction) and by more than the noise. There is no steady level
    if the last one covers less than a quarter of the steps, or if more than a quarter of those after its start are at
    another. Steps that are slower at first, a passing burst and a lone slow step are no drift; fewer than six steps
    show none. On flat noise it finds one in about one series of 25 at the most.

    Raises ValueError for no samples, for samples not finite and above zero, and for tolerance < 0.
    """
    import numpy as np

    allowed = math.log1p(checked_number("tolerance", tolerance, at_least=0, strictly=False))
    series = [checked_samples(f"trial {index}", trial, positive=True) for index, trial in enumerate(trials)]
    found = [False] * len(series)
    by_length: dict[int, list[int]] = {}
    for index, one in enumerate(series):
        if one.size >= 2 * _LEAST_SEGMENT:
            by_length.setdefault(one.size, []).append(index)
    for alike in by_length.values():
        for start in range(0, len(alike), _AT_ONCE):
            some = alike[start : start + _AT_ONCE]
            log_times = np.log(np.stack([series[index] for index in some]))
            for index, drifted in zip(some, _drifting(log_times, allowed), strict=True):
                found[index] = drifted
    return found


def _drifting(log_times: NDArray[float64], allowed: float) -> list[bool]:
    """Of series of one length, a row each. Most are at one level, which is seen of all of them at once."""
    import numpy as np

    noise = np.maximum(np.median(np.abs(np.diff(log_times, axis=1)), axis=1) * _MAD_TO_SD, _NOISE_FLOOR)
    despiked = _without_hiccups(log_times)
    penalty = _PENALTY_PER_LOG_N * math.log(log_times.shape[1])
    _, gains = _best_splits(despiked / noise[:, None])
    return [
        bool(gain > penalty) and _finds_no_level(row, float(sd), allowed, penalty)
        for row, sd, gain in zip(despiked, noise, gains, strict=True)
    ]


def _finds_no_level(despiked: NDArray[float64], noise: float, allowed: float, penalty: float) -> bool:
    """Whether a series that changes its level gets slower by it, or has no steady one."""
    count = despiked.size
    starts = _segment_starts(despiked / noise, penalty)
    segments = [despiked[start:end] for start, end in itertools.pairwise([*starts, count])]
    levels, last = [float(segment.mean()) for segment in segments], segments[-1]
    # Segments that do not touch are distinguished by the criterion that parts neighbours, and only beyond the
    # tolerance.
    steady = [
        abs(level - levels[-1]) <= max(allowed, noise * math.sqrt(penalty * (1 / segment.size + 1 / last.size)))
        for level, segment in zip(levels, segments, strict=True)
    ]
    first = steady.index(True)
    at_level = sum(segment.size for segment, same in zip(segments, steady, strict=True) if same)
    if at_level < _LEAST_STEADY_SHARE * count or at_level < _LEAST_SHARE_AT_LEVEL * (count - starts[first]):
        return True
    return any(level < levels[-1] for level in levels[:first])


def _without_hiccups(log_times: NDArray[float64]) -> NDArray[float64]:
    """A running median of three: lone slow steps go, shifts keep their place, the first step (compilation) stays."""
    import numpy as np

    despiked = log_times.copy()
    left, middle, right = log_times[:, :-2], log_times[:, 1:-1], log_times[:, 2:]
    despiked[:, 1:-1] = np.maximum(np.minimum(left, middle), np.minimum(np.maximum(left, middle), right))
    despiked[:, -1] = despiked[:, -2]
    return despiked


def _segment_starts(values: NDArray[float64], penalty: float) -> list[int]:
    """Starts of the segments of constant mean, in order and with the first 0; `values` in units of the noise."""
    starts = [0]
    pending = [(0, values.size)]
    while pending:
        start, end = pending.pop()
        if end - start < 2 * _LEAST_SEGMENT:
            continue
        splits, gains = _best_splits(values[None, start:end])
        if gains[0] > penalty:
            split = start + int(splits[0])
            starts.append(split)
            pending += [(start, split), (split, end)]
    return sorted(starts)


def _best_splits(values: NDArray[float64]) -> tuple[NDArray[intp], NDArray[float64]]:
    """Of each row, where a change of the mean saves most squared error, and how much it saves."""
    import numpy as np

    count = values.shape[1]
    sums = np.cumsum(values - values.mean(axis=1, keepdims=True), axis=1)
    splits = np.arange(_LEAST_SEGMENT, count - _LEAST_SEGMENT + 1)
    # With the total at zero, the gain of a split after k of n is S_k^2 n / (k (n - k)).
    gains = sums[:, splits - 1] ** 2 * count / (splits * (count - splits))
    best = gains.argmax(axis=1)
    return splits[best], np.take_along_axis(gains, best[:, None], axis=1)[:, 0]
