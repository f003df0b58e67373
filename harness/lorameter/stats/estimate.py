"""Estimates a value with its interval over replicates, for one variant and one metric.

Each trial gives one value, the median of its samples, and the interval is Student's t over trials, because the process
and not the sample is the independent unit (Kalibera & Jones 2013). Both are on the log scale, since times and sizes
scatter by factors: the centre is the geometric mean of the medians, and the interval cannot reach below zero.

A measurement may stop when the intervals are narrow enough, but never because of a significant result. Testing after
every replicate and stopping at the first alarm raised the false alarms on identical code from 4.6 to 20.7 %. The width
of an interval says nothing about where its centre lies, so stopping on it leaves the error rate nearly as it is (Stein
1945; Kelley, Maxwell & Rausch 2003 call it accuracy in parameter estimation), if there is a minimum number of
replicates: the first two or three can agree by chance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorameter.stats.effect import from_log
from lorameter.stats.intervals import quantile
from lorameter.stats.samples import checked_number, checked_trials, medians_of
from lorameter.stats.verdict import checked_alpha

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy import float64
    from numpy.typing import NDArray

    from lorameter.stats.verdict import Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value, in the unit of the samples, with its (1 - alpha) interval over replicates."""

    value: float
    """Geometric mean of the trials' medians (with blocks, of the block values); the arithmetic mean if a median is zero
    or negative."""
    low: float | None
    """Lower end; None with one replicate, which gives no interval."""
    high: float | None
    """Upper end; None with one replicate, or if it exceeds the range of a float."""
    replicates: int
    """Number of trials."""
    samples: int
    """Number of samples of all trials; more samples do not narrow the interval."""


def estimate_trials(
    trials: Sequence[Sequence[float]], *, alpha: float = 0.05, blocks: Sequence[str] | None = None
) -> Estimate:
    """The estimate from a list of samples for each trial.

    `blocks` names the block of each trial, such as its machine. Trials of one block are not independent, so with two or
    more blocks each block counts as one value, the mean of its trials. Treating eight trials on four machines as
    independent gave 95 % intervals that covered the true mean in only 81 of 100 simulated runs, with a scatter between
    machines of three times that between trials.

    With one replicate `low` and `high` are None, however many samples it has. If any trial's median is zero or negative
    (a loss can be), the centre and the interval are computed on the linear scale.

    Raises ValueError, naming the trial and sample, for an empty list or trial and for NaN or infinite samples; for
    values whose mean overflows; and if `blocks` does not have one entry for each trial.
    """
    import numpy as np

    checked_alpha(alpha)
    arrays = checked_trials("trials", trials, positive=False)
    if blocks is not None and len(blocks) != len(arrays):
        raise ValueError(f"{len(blocks)} blocks are named for {len(arrays)} trials")
    with np.errstate(over="ignore", invalid="ignore"):
        return _estimate(arrays, alpha, blocks)


def _estimate(arrays: Sequence[NDArray[float64]], alpha: float, blocks: Sequence[str] | None) -> Estimate:
    import numpy as np

    medians = medians_of(arrays)
    logs = bool((medians > 0).all())
    values = np.log(medians) if logs else medians
    if blocks is not None and len(named := sorted(set(blocks))) > 1:
        values = np.array([values[np.equal(blocks, name)].mean() for name in named])
    centre = float(values.mean())
    low: float | None = None
    high: float | None = None
    if values.size > 1:
        half_width = quantile(values.size - 1, alpha / 2) * float(values.std(ddof=1)) / math.sqrt(values.size)
        low, high = centre - half_width, centre + half_width
        if logs:
            low, high = from_log(low), from_log(high)
    value = float(medians[0]) if medians.size == 1 else (from_log(centre) if logs else centre)
    if value is None or not all(math.isfinite(number) for number in (value, low or 0, high or 0)):
        raise ValueError(f"the trials' medians, up to {np.abs(medians).max():g}, add up to no number: check the units")
    return Estimate(
        value=value, low=low, high=high, replicates=len(arrays), samples=sum(array.size for array in arrays)
    )


def is_precise(comparisons: Iterable[Comparison], *, half_width: float, least_replicates: int = 5) -> bool:
    """Whether every comparison has its replicates and an interval no wider than ± `half_width` (a fraction).

    Pass comparisons whose intervals have one fixed level (`compare_trials` with a fixed `family`): Holm's intervals
    narrow with every decided comparison, so that stopping would depend on significance again. Returns False without
    comparisons, and if an interval has no end. Raises ValueError for half_width <= 0 and for least_replicates < 2.
    """
    limit = checked_number("half_width", half_width, at_least=0, strictly=True)
    checked_number("least_replicates", least_replicates, at_least=2, strictly=False)
    widths = [relative_half_width(one) if one.replicates >= least_replicates else None for one in comparisons]
    return bool(widths) and all(width is not None and width <= limit for width in widths)


def relative_half_width(comparison: Comparison) -> float | None:
    """Half the interval of the log ratio, as a fraction: 0.02 if it reaches from ratio/1.02 to ratio*1.02.

    None if an end is missing or zero, which is infinitely far away on the log scale.
    """
    if not comparison.low or comparison.high is None:
        return None
    half = (math.log(comparison.high) - math.log(comparison.low)) / 2
    return math.expm1(half)
