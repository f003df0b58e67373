"""Finds level changes: in a series of repeated measurements, with the smallest change that would have been found, and
in the timed steps of a trial; decides when a warm-up ends.

In a series of measurements, the values are logarithms, one per run. Between changes they scatter around a level with a
constant standard deviation. The best segmentation minimises the sum of squares plus a penalty for each change: optimal
partitioning (Jackson et al. 2005). PELT finds the same exact solution faster if there are many changes (Killick,
Fearnhead & Eckley 2012). Series of nightly runs are short with few changes, so all segmentations are evaluated, with
vectorised operations.

The penalty is in units of the variance, which must be estimated. A first estimate from successive differences, which a
change hardly affects, gives a first segmentation. The scatter around its levels is a better estimate, free of the
changes, and gives the final segmentation. `FEW_VALUES_PENALTY` accounts for the uncertain scatter of few values.

Levels give no verdict: runs at different times have only the machine in common, and two similar levels are never called
equivalent.

A level change in timed steps is a throttled clock, a memory leak, or other work that started or ended. The steady state
of a series is found as in Barrett et al. (2017, "Virtual machine warmup blows hot and cold"), from change points in the
log step times: it is the level of the last segment, if enough of the series is at this level. The change points come
from binary segmentation (Scott & Knott 1974) on shifts of the mean, with a penalty of three log n per change, a
BIC-type criterion (Yao 1988, made stricter because step times are not quite independent). The unit of cost is the noise
between neighbours, so that a drift or a shift does not inflate it.

In a warm-up kernels are compiled, caches filled, and the clock becomes stable. A fixed number of discarded steps is
either too small for a compiled model or wasteful for an eager one, so the test runs after each step and must be cheap.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lorameter.stats.intervals import Estimate, quantile
from lorameter.stats.samples import Array, checked_samples

MIN_POINTS = 10
"""With fewer values, the scatter cannot be estimated."""
MIN_SEGMENT = 3
"""Minimum values of a level."""
WINDOW, OUTLIER_SDS = 5, 3.0
"""A value is an outlier if it is farther than `OUTLIER_SDS` standard deviations from the median of `WINDOW` neighbours
(including itself), and is moved to that distance: one night with other load must not make a level, but three nights of
a new level are a majority."""
PENALTY, FEW_VALUES_PENALTY = 9.0, 110.0
"""A change must reduce the sum of squares by `PENALTY` variances, plus `FEW_VALUES_PENALTY` divided by the number of
values, because few values underestimate the scatter. With these, at most 4 % of simulated series of 10 to 90 values
without a change show one."""
ALPHA = 0.05
POWER_Z = 0.8416
"""Distance from a limit, in standard deviations, at which the limit is exceeded with 80 % power."""
_NORMAL_QUARTILE = 0.6745
_ROUNDING = 1e-9
"""A change that reduces the total sum of squares by less than this share is ignored."""
_TRIMMED, _OF_TRIMMED = 0.1, 1.13
"""Share of the largest squared differences that are left out, and the correction of the rest for normal values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level(Estimate):
    """Values between two changes: the mean of their logs, with its 95 % interval if the scatter is known."""

    first: int
    """Index of its first value."""
    end: int
    """Index after its last value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelShift:
    """The change from one level to the next."""

    first: int
    """Index of the first value of the new level."""
    log_ratio: float
    """The new level over the previous one."""
    low: float
    """Lower end of its 95 % interval, as if the position had been known: the search makes a change look larger."""
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """The levels of a series of values."""

    levels: tuple[Level, ...]
    """In order; one level if no change was found, none without values."""
    changes: tuple[LevelShift, ...]
    scatter: float | None
    """Standard deviation of the logs around their levels; None with fewer than `MIN_POINTS` values."""
    detectable: float | None
    """The smallest change of the last level, as a log ratio, that three more values would show with 80 % power."""


def find_changes(logs: Sequence[float]) -> Course:
    """The levels of finite log values in the order of measurement."""
    import numpy as np

    values = np.asarray(logs, dtype=float)
    if values.size < MIN_POINTS:
        few = [_level(values, 0, values.size, None, 0)] if values.size else []
        return Course(levels=tuple(few), changes=(), scatter=None, detectable=None)
    needed, guess = PENALTY + FEW_VALUES_PENALTY / values.size, _guess_scatter(values)
    values = _without_outliers(values, guess)
    ends = find_segments(values, needed * guess**2)
    scatter = _scatter_around(values, ends)
    ends = find_segments(values, needed * scatter**2)
    scatter, df = _scatter_around(values, ends), values.size - len(ends)
    levels = tuple(_level(values, first, end, scatter, df) for first, end in zip((0, *ends[:-1]), ends, strict=True))
    last = levels[-1].end - levels[-1].first
    error = scatter * math.sqrt(1 / last + 1 / MIN_SEGMENT)
    return Course(
        levels=levels,
        changes=tuple(_change(before, after, scatter, df) for before, after in itertools.pairwise(levels)),
        scatter=scatter,
        detectable=(math.sqrt(needed) + POWER_Z) * error,
    )


def find_segments(values: Array, penalty: float, least: int = MIN_SEGMENT) -> tuple[int, ...]:
    """The ends of the levels that minimise the sum of squares plus `penalty` a change; a level has at least `least`
    values.

    The last end is the number of values. Without any scatter, every difference above the rounding error is a change.
    """
    import numpy as np

    count = values.size
    centred = values - values.mean()  # avoids rounding errors in the squares of values far from zero
    sums = np.concatenate([[0.0], np.cumsum(centred)])
    squares = np.concatenate([[0.0], np.cumsum(centred**2)])
    penalty = max(penalty, _ROUNDING * float(squares[-1]))
    lengths = np.arange(count, -1, -1.0)  # from each start to the last value
    before = np.full(count + 1, np.inf)  # the least cost up to each end, less the squares up to there
    before[0] = -penalty
    previous_start = np.zeros(count + 1, dtype=int)
    for end in range(least, count + 1):
        begins = end - least + 1
        reductions = sums[end] - sums[:begins]
        reductions *= reductions
        reductions /= lengths[count - end : count - end + begins]
        costs = before[:begins] - reductions
        previous_start[end] = found = int(costs.argmin())
        before[end] = costs[found] + penalty
    ends = [count]
    while (begin := int(previous_start[ends[-1]])) > 0:
        ends.append(begin)
    return tuple(reversed(ends))


def _guess_scatter(values: Array) -> float:
    """The standard deviation from successive differences: the larger of two estimates, by their median and by the root
    mean square of all but the largest ones."""
    import numpy as np

    differences = np.sort(np.abs(np.diff(values)))
    trimmed = differences[: differences.size - max(1, math.ceil(_TRIMMED * differences.size))]
    by_median = float(np.median(differences)) / _NORMAL_QUARTILE
    return max(by_median, _OF_TRIMMED * math.sqrt(float((trimmed**2).mean()))) / math.sqrt(2)


def _without_outliers(values: Array, scatter: float) -> Array:
    import numpy as np

    places = np.arange(values.size)
    first = np.clip(places - WINDOW // 2, 0, values.size - WINDOW)
    medians = np.median(np.lib.stride_tricks.sliding_window_view(values, WINDOW)[first], axis=1)
    return np.clip(values, medians - OUTLIER_SDS * scatter, medians + OUTLIER_SDS * scatter)


def _scatter_around(values: Array, ends: Sequence[int]) -> float:
    """The standard deviation around the levels; its degrees of freedom account for the levels and change positions."""
    squares = sum(
        float(((values[first:end] - values[first:end].mean()) ** 2).sum())
        for first, end in zip((0, *ends[:-1]), ends, strict=True)
    )
    return math.sqrt(squares / (values.size - 1 - 2 * (len(ends) - 1)))


def _level(values: Array, first: int, end: int, scatter: float | None, df: int) -> Level:
    mean = float(values[first:end].mean())
    if scatter is None:
        return Level(first=first, end=end, value=mean, low=None, high=None)
    half = quantile(df, ALPHA / 2) * scatter / math.sqrt(end - first)
    return Level(first=first, end=end, value=mean, low=mean - half, high=mean + half)


def _change(before: Level, after: Level, scatter: float, df: int) -> LevelShift:
    ratio = after.value - before.value
    error = scatter * math.sqrt(1 / (before.end - before.first) + 1 / (after.end - after.first))
    half = quantile(df, ALPHA / 2) * error
    return LevelShift(first=after.first, log_ratio=ratio, low=ratio - half, high=ratio + half)


# --- timed steps of a trial -------------------------------------------------------------------------------------------

_PENALTY_PER_LOG_N = 3.0
# Minimum noise of a thousandth, because with coarse clocks most differences are exactly zero.
_NOISE_FLOOR = 1e-3
# Converts the median absolute difference of neighbours to a standard deviation of normal values: 1.4826, and a factor
# for the difference of two steps.
_MAD_TO_SD = 1.4826 / math.sqrt(2)
# Barrett et al. require the last quarter of a series to be steady; and most steps after its start must be at its level.
_MIN_STEADY_SHARE = 0.25
_MIN_SHARE_AT_LEVEL = 0.75


def drifting(trials: Sequence[Sequence[float]], *, tolerance: float) -> list[bool]:
    """For each series of step times, whether it becomes slower, or has no steady level.

    Levels differ if the difference exceeds `tolerance` (a fraction) and the noise. There is no steady level if the last
    one covers less than a quarter of the steps, or if more than a quarter of the steps after its start are at another
    level. Slower first steps, a temporary burst and a single slow step do not count as drift; with fewer than six steps
    there is none. The false-positive rate on stationary noise is about one in 25 series at most.

    Raises ValueError without samples, and for samples that are not finite and above zero.
    """
    import numpy as np

    allowed = math.log1p(tolerance)
    series = [checked_samples(f"trial {index}", trial, positive=True) for index, trial in enumerate(trials)]
    found = [False] * len(series)
    by_length: dict[int, list[int]] = {}
    for index, times in enumerate(series):
        if times.size >= 2 * MIN_SEGMENT:
            by_length.setdefault(times.size, []).append(index)
    for indexes in by_length.values():
        log_times = np.log(np.stack([series[index] for index in indexes]))
        for index, drifted in zip(indexes, _drifting(log_times, allowed), strict=True):
            found[index] = drifted
    return found


def _drifting(log_times: Array, allowed: float) -> list[bool]:
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


def _finds_no_level(despiked: Array, noise: float, allowed: float, penalty: float) -> bool:
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


def _median_filter(log_times: Array) -> Array:
    """A running median of three: it removes single slow steps, preserves the positions of shifts, and keeps the first
    step (compilation)."""
    import numpy as np

    despiked = log_times.copy()
    left, middle, right = log_times[:, :-2], log_times[:, 1:-1], log_times[:, 2:]
    despiked[:, 1:-1] = np.maximum(np.minimum(left, middle), np.minimum(np.maximum(left, middle), right))
    despiked[:, -1] = despiked[:, -2]
    return despiked


def _segment_starts(values: Array, penalty: float) -> list[int]:
    """Start indices of the segments of constant mean, in order, beginning with 0; `values` is in units of the noise."""
    starts = [0]
    pending = [(0, values.size)]
    while pending:
        start, end = pending.pop()
        if end - start < 2 * MIN_SEGMENT:
            continue
        splits, gains = _best_splits(values[None, start:end])
        if gains[0] > penalty:
            split = start + splits[0]
            starts.append(split)
            pending += [(start, split), (split, end)]
    return sorted(starts)


def _best_splits(values: Array) -> tuple[list[int], Array]:
    """For each row, the split that reduces the squared error most, and the reduction."""
    import numpy as np

    count = values.shape[1]
    sums = np.cumsum(values - values.mean(axis=1, keepdims=True), axis=1)
    splits = np.arange(MIN_SEGMENT, count - MIN_SEGMENT + 1)
    # With a total of zero, the gain of a split after k of n values is S_k^2 n / (k (n - k)).
    gains = sums[:, splits - 1] ** 2 * count / (splits * (count - splits))
    best = gains.argmax(axis=1)
    return splits[best].tolist(), np.take_along_axis(gains, best[:, None], axis=1)[:, 0]


WARMUP_WINDOW = 3
"""Number of steps without a downward trend that ends a warm-up."""


def is_steady(samples: Sequence[float], window: int = WARMUP_WINDOW, *, tolerance: float = 0.02) -> bool:
    """Whether step times are steady: the last `window` steps are no longer faster than the `window` steps before them.

    True when the median log time of the last `window` steps is at most `tolerance` (a fraction) below that of the
    preceding window; False while there are fewer than two windows. An upward trend does not prolong the warm-up.
    Medians ignore a single slow step. The cost is O(window), so the test may run after each step. Noise is not
    modelled: it delays the end by a few steps, and hides a decay that is smaller than the noise of a window's median.

    Raises ValueError for samples in the two windows that are not above zero.
    """
    allowed = math.log1p(tolerance)
    if len(samples) < 2 * window:
        return False
    first = len(samples) - 2 * window
    return _median_log(samples, first, window) - _median_log(samples, first + window, window) <= allowed


def is_warm(samples: Sequence[float], least: int, most: int) -> bool:
    """Whether a warm-up has ended: it has at least `least` steps and is steady, or it has `most` steps."""
    return len(samples) >= most or (len(samples) >= least and is_steady(samples))


def _median_log(samples: Sequence[float], first: int, window: int) -> float:
    """The median log time of `window` steps from `first` on."""
    return statistics.median(map(math.log, samples[first : first + window]))
