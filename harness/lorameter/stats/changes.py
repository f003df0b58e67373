"""Finds level changes in a series of repeated measurements, and the smallest change that would have been found.

The values are logarithms, one per run. Between changes they scatter around a level with a constant standard deviation.
The best segmentation minimises the sum of squares plus a penalty for each change: optimal partitioning (Jackson et al.
2005). PELT finds the same exact solution faster if there are many changes (Killick, Fearnhead & Eckley 2012). Series of
nightly runs are short with few changes, so all segmentations are evaluated, with vectorised operations.

The penalty is in units of the variance, which must be estimated. A first estimate from successive differences, which a
change hardly affects, gives a first segmentation. The scatter around its levels is a better estimate, free of the
changes, and gives the final segmentation. `OF_FEW` accounts for the uncertain scatter of few values.

Levels give no verdict: runs at different times have only the machine in common, and two similar levels are never called
equivalent.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorameter.stats.intervals import quantile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy import float64
    from numpy.typing import NDArray

MIN_POINTS = 10
"""With fewer values, the scatter cannot be estimated."""
MIN_SEGMENT = 3
"""Minimum values of a level."""
WINDOW, FARTHEST = 5, 3.0
"""A value is an outlier if it is farther than `FARTHEST` standard deviations from the median of `WINDOW` neighbours
(including itself), and is moved to that distance: one night with other load must not make a level, but three nights of
a new level are a majority."""
PENALTY, OF_FEW = 9.0, 110.0
"""A change must reduce the sum of squares by `PENALTY` variances, plus `OF_FEW` divided by the number of values,
because few values underestimate the scatter. With these, at most 4 % of simulated series of 10 to 90 values without a
change show one."""
ALPHA = 0.05
POWER_Z = 0.8416
"""Distance from a limit, in standard deviations, at which the limit is exceeded with 80 % power."""
_NORMAL_QUARTILE = 0.6745
_ROUNDING = 1e-9
"""A change that reduces the total sum of squares by less than this share is ignored."""
_TRIMMED, _OF_TRIMMED = 0.1, 1.13
"""Share of the largest squared differences that are left out, and the correction of the rest for normal values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Values between two changes."""

    first: int
    """Index of its first value."""
    end: int
    """Index after its last value."""
    mean: float
    """Mean of the logs."""
    low: float | None
    """Lower end of the mean's 95 % interval; None without a scatter."""
    high: float | None


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
    """The levels of log values in the order of measurement. Raises ValueError for values that are not finite."""
    import numpy as np

    values = np.asarray(logs, dtype=float)
    if not np.isfinite(values).all():
        raise ValueError("logs: values that are not finite have no level: leave them out")
    if values.size < MIN_POINTS:
        few = [_level(values, 0, values.size, None, 0)] if values.size else []
        return Course(levels=tuple(few), changes=(), scatter=None, detectable=None)
    needed, guess = PENALTY + OF_FEW / values.size, _guess_scatter(values)
    values = _without_outliers(values, guess)
    ends = divide(values, needed * guess**2)
    scatter = _scatter_around(values, ends)
    ends = divide(values, needed * scatter**2)
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


def divide(values: NDArray[float64], penalty: float, least: int = MIN_SEGMENT) -> tuple[int, ...]:
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


def _guess_scatter(values: NDArray[float64]) -> float:
    """The standard deviation from successive differences: the larger of two estimates, by their median and by the root
    mean square of all but the largest ones."""
    import numpy as np

    differences = np.sort(np.abs(np.diff(values)))
    kept = differences[: differences.size - max(1, math.ceil(_TRIMMED * differences.size))]
    by_median = float(np.median(differences)) / _NORMAL_QUARTILE
    return max(by_median, _OF_TRIMMED * math.sqrt(float((kept**2).mean()))) / math.sqrt(2)


def _without_outliers(values: NDArray[float64], scatter: float) -> NDArray[float64]:
    import numpy as np

    places = np.arange(values.size)
    first = np.clip(places - WINDOW // 2, 0, values.size - WINDOW)
    medians = np.median(np.lib.stride_tricks.sliding_window_view(values, WINDOW)[first], axis=1)
    return np.clip(values, medians - FARTHEST * scatter, medians + FARTHEST * scatter)


def _scatter_around(values: NDArray[float64], ends: Sequence[int]) -> float:
    """The standard deviation around the levels; its degrees of freedom account for the levels and change positions."""
    squares = sum(
        float(((values[first:end] - values[first:end].mean()) ** 2).sum())
        for first, end in zip((0, *ends[:-1]), ends, strict=True)
    )
    return math.sqrt(squares / (values.size - 1 - 2 * (len(ends) - 1)))


def _level(values: NDArray[float64], first: int, end: int, scatter: float | None, df: int) -> Level:
    mean = float(values[first:end].mean())
    if scatter is None:
        return Level(first=first, end=end, mean=mean, low=None, high=None)
    half = quantile(df, ALPHA / 2) * scatter / math.sqrt(end - first)
    return Level(first=first, end=end, mean=mean, low=mean - half, high=mean + half)


def _change(before: Level, after: Level, scatter: float, df: int) -> LevelShift:
    ratio = after.mean - before.mean
    error = scatter * math.sqrt(1 / (before.end - before.first) + 1 / (after.end - after.first))
    half = quantile(df, ALPHA / 2) * error
    return LevelShift(first=after.first, log_ratio=ratio, low=ratio - half, high=ratio + half)
