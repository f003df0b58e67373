"""Where a number that is measured again and again takes another level, and what would not have been seen.

The values are logs, one a run. Between changes they scatter around a level with one standard deviation, and the best
division into levels is the one with the least sum of squares plus a penalty for each change: optimal partitioning
(Jackson et al. 2005), whose exact solution PELT finds faster where changes are many (Killick, Fearnhead & Eckley 2012).
Lines of nightly runs are short and their changes few, so all divisions are weighed, a vector at a time.

The penalty is in squared standard deviations, and these are not known. A first guess from successive differences, which
a change hardly touches, gives a first division; the scatter around its levels, which is the better estimate and knows
no change, gives the last. That the scatter of few values is itself uncertain is paid for by `OF_FEW`.

No verdict follows from a level: runs of different times share nothing but the machine, and two levels that look alike
are never called equivalent.
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

LEAST_POINTS = 10
"""Fewer say nothing of their own scatter."""
LEAST_SEGMENT = 3
"""A level is one from so many values on."""
WINDOW, FARTHEST = 5, 3.0
"""A value farther from the median of so many neighbours, itself among them, than so many standard deviations counts as
one that lies there: a night with other load must not make a level, and three nights of a new one are a majority."""
PENALTY, OF_FEW = 9.0, 110.0
"""A change must gain `PENALTY` squared standard deviations, and `OF_FEW` more, divided by the number of values, whose
scatter few values put too low. With these, 4 % at most of simulated lines of 10 to 90 values without a change show
one."""
ALPHA = 0.05
POWER_Z = 0.8416
"""Standard deviations above a limit at which it is passed with 80 % power."""
_NORMAL_QUARTILE = 0.6745
_ROUNDING = 1e-9
"""A change that gains less than this part of all squares is none."""
_TRIMMED, _OF_TRIMMED = 0.1, 1.13
"""Share of the largest squared differences that are left out, and what that takes from the rest of normal ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Values between two changes."""

    first: int
    """Place of its first value."""
    end: int
    """Place after its last value."""
    mean: float
    """Of the logs."""
    low: float | None
    """Lower end of the 95 % interval of the mean; None without a scatter."""
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelShift:
    """From one level to the next."""

    first: int
    """Place of the first value of the new level."""
    log_ratio: float
    """The new level over the one before."""
    low: float
    """Lower end of its 95 % interval, as if the place had been known before: looking for it makes it look larger."""
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """The levels of a line of values."""

    levels: tuple[Level, ...]
    """In their order; one where no change was found, none of no values."""
    changes: tuple[LevelShift, ...]
    scatter: float | None
    """Standard deviation of the logs around their levels; None of fewer than `LEAST_POINTS`."""
    detectable: float | None
    """The smallest change of the last level, as a log ratio, that three values more would show with 80 % power."""


def find_changes(logs: Sequence[float]) -> Course:
    """The levels of values in the order measured, given as logs. Raises ValueError for what is not finite."""
    import numpy as np

    values = np.asarray(logs, dtype=float)
    if not np.isfinite(values).all():
        raise ValueError("logs: values that are not finite have no level: leave them out")
    if values.size < LEAST_POINTS:
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
    error = scatter * math.sqrt(1 / last + 1 / LEAST_SEGMENT)
    return Course(
        levels=levels,
        changes=tuple(_change(before, after, scatter, df) for before, after in itertools.pairwise(levels)),
        scatter=scatter,
        detectable=(math.sqrt(needed) + POWER_Z) * error,
    )


def divide(values: NDArray[float64], penalty: float, least: int = LEAST_SEGMENT) -> tuple[int, ...]:
    """The ends of the levels with the least sum of squares plus `penalty` a change, none shorter than `least`.

    The last end is the number of values. Where there is no scatter at all, only what rounding does is no change.
    """
    import numpy as np

    count = values.size
    centred = values - values.mean()  # squares of what lies far off would round the small differences away
    sums = np.concatenate([[0.0], np.cumsum(centred)])
    squares = np.concatenate([[0.0], np.cumsum(centred**2)])
    penalty = max(penalty, _ROUNDING * float(squares[-1]))
    lengths = np.arange(count, -1, -1.0)  # of what begins at each place, to the last of all
    before = np.full(count + 1, np.inf)  # the least cost of what ends at a place, less the squares up to there
    before[0] = -penalty
    came_from = np.zeros(count + 1, dtype=int)
    for end in range(least, count + 1):
        begins = end - least + 1
        gained = sums[end] - sums[:begins]
        gained *= gained
        gained /= lengths[count - end : count - end + begins]
        costs = before[:begins] - gained
        came_from[end] = found = int(costs.argmin())
        before[end] = costs[found] + penalty
    ends = [count]
    while (begin := int(came_from[ends[-1]])) > 0:
        ends.append(begin)
    return tuple(reversed(ends))


def _guess_scatter(values: NDArray[float64]) -> float:
    """The standard deviation by successive differences: the larger of the estimates by their median, and by the root
    mean square of all but the largest."""
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
    """The standard deviation around the levels; a level and the place of its change are taken from the data."""
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
