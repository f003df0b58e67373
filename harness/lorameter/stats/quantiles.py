"""Quantiles with intervals from order statistics, and without intervals if there are too few samples.

A cold start has one value per process and an unknown distribution, and a tail quantile is not a mean, so t intervals do
not apply. The number of samples below the true quantile is binomial for every distribution, so two order statistics
bracket it with a known probability (Thompson 1936; Conover, "Practical Nonparametric Statistics", 1999, section 3.2;
the same as the interval of `scipy.stats.quantile_test`). This limits what few samples can show: five values never
bracket a median with 95 %, and the largest of n samples bounds the quantile q with a confidence of only 1 - q^n, so a
p99 needs 299 samples.

Step times are autocorrelated: on a noisy machine 31 % of the processes had a lag-1 autocorrelation above 0.26, and one
in ten had at most 13 independent steps among its 60. Tail quantiles of such a series use the number of independent
steps (`effective_size`). The sum of the autocorrelations is truncated by Geyer's initial monotone sequence ("Practical
Markov chain Monte Carlo", 1992, section 3.3): sums of neighbouring lags, while they are positive and not above the one
before.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorameter.stats.samples import checked_samples

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy import float64
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantileEstimate:
    """A quantile, in the unit of the samples, with the order statistics that bracket it."""

    value: float | None
    """The quantile; None only if there are too few samples."""
    low: float | None
    high: float | None
    samples: int
    reason: str | None
    """Why a value is None, with the number of samples needed; None if all values are given."""


# Smaller relative differences are rounding errors: in probabilities, and in deviations from a mean, whose correlation
# would be meaningless.
_ROUNDING = 1e-12


def median_interval(values: Sequence[float], *, alpha: float = 0.05) -> QuantileEstimate:
    """The median of independent values (one a process) with its two-sided (1 - alpha) interval.

    The median itself is always given; `low` and `high` are None if even the smallest and the largest value do not
    bracket it with that confidence (95 % needs 6 values). Raises ValueError without values, and for values that are not
    finite.
    """
    import numpy as np

    ordered = np.sort(checked_samples("values", values, positive=False))
    tail = alpha / 2
    needed = _least_samples(0.5, tail)
    supported = ordered.size >= needed
    low, high = _ranks(ordered.size, 0.5, tail) if supported else (None, None)
    return QuantileEstimate(
        value=float(np.median(ordered)),
        low=None if low is None else float(ordered[low - 1]),
        high=None if high is None else float(ordered[high - 1]),
        samples=ordered.size,
        reason=None
        if supported
        else f"a {100 * (1 - alpha):.4g} % interval of the median is not supported by n = {ordered.size}: "
        f"measure {needed} processes",
    )


def percentile(
    samples: Sequence[float], q: float, *, confidence: float = 0.95, effective_size: float | None = None
) -> QuantileEstimate:
    """The quantile `q` (a fraction: 0.99 for p99) with a lower and an upper bound, each of this one-sided confidence.

    `effective_size` is the equivalent number of independent samples (`lorameter.stats.effective_size`), at most the
    number of samples; it determines the width of the bounds. If it is too small for the quantile (with 95 %, p90 needs
    29, p95 59, p99 299), all three numbers are None. Raises ValueError without samples, and for samples that are not
    finite.
    """
    import numpy as np

    ordered = np.sort(checked_samples("samples", samples, positive=False))
    size = ordered.size if effective_size is None else min(ordered.size, math.floor(effective_size))
    needed = _least_samples(q, 1 - confidence)
    if size < needed:
        worth = "" if size == ordered.size else f" (what {ordered.size} dependent samples are worth)"
        return QuantileEstimate(
            value=None,
            low=None,
            high=None,
            samples=ordered.size,
            reason=f"p{100 * q:.4g} is not supported by n = {size}{worth}: "
            f"a confidence of {100 * confidence:.4g} % takes {needed}",
        )
    low, high = _ranks(size, q, 1 - confidence)
    # The ranks are for `size` independent samples; they are rounded outwards to ranks among all samples.
    every = ordered.size
    return QuantileEstimate(
        value=float(np.quantile(ordered, q)),
        low=float(ordered[(low - 1) * every // size]),
        high=float(ordered[-(-high * every // size) - 1]),
        samples=every,
        reason=None,
    )


def _least_samples(q: float, tail: float) -> int:
    """The smallest n for which the extremes bound the quantile on both sides: max(q, 1 - q)^n <= tail."""
    exact = math.log(tail) / math.log(max(q, 1 - q))
    return max(math.ceil(exact - 1e-9), 1)


def _ranks(size: int, q: float, tail: float) -> tuple[int, int]:
    """Ranks (from 1) of the order statistics for which the quantile lies below, or above, with probability at most
    `tail`.

    Uses `scipy.special`, because importing `scipy.stats` takes half a second.
    """
    from scipy.special import bdtr, bdtrc

    counts = range(size + 1)  # number of samples below the quantile
    reached = tail * (1 + _ROUNDING)
    # A count whose probability just equals the tail is also allowed, so the first count beyond it is used.
    low = bisect.bisect_right(counts, reached, key=lambda count: float(bdtr(count, size, q)))
    high = bisect.bisect_left(counts, -reached, key=lambda count: -float(bdtrc(count, size, q)))
    return max(low, 1), min(high + 1, size)


def effective_size(samples: Sequence[float]) -> float:
    """The number of independent samples with the same error of the mean, between 1 and the number of samples.

    Constant series and series with fewer than 4 samples, for which no correlation can be estimated, count in full. So
    do alternating series, although their mean is more precise than that of independent samples. Raises ValueError
    without samples, and for samples that are not finite.
    """
    import numpy as np

    values = checked_samples("samples", samples, positive=False)
    largest = float(np.abs(values).max())
    deviations = values / largest if largest > 0 else values  # prevents overflow of squares
    deviations = deviations - deviations.mean()
    if values.size < 4 or np.abs(deviations).max() <= _ROUNDING:
        return float(values.size)
    correlations = _autocorrelations(deviations)
    pairs = correlations[: correlations.size // 2 * 2].reshape(-1, 2).sum(axis=1)
    ended = pairs <= 0
    first_end = int(ended.argmax()) if ended.any() else pairs.size
    pairs = np.minimum.accumulate(pairs[:first_end])
    steps_per_sample = 2 * float(pairs.sum()) - 1
    return values.size / min(max(steps_per_sample, 1.0), float(values.size))


def _autocorrelations(deviations: NDArray[float64]) -> NDArray[float64]:
    """Autocorrelations at lags 0 to n - 1, each divided by n: the biased estimate, which decays; O(n log n)."""
    import numpy as np
    from scipy import fft

    count = deviations.size
    spectrum = fft.rfft(deviations, fft.next_fast_len(2 * count, real=True))
    products = fft.irfft(np.abs(spectrum) ** 2, fft.next_fast_len(2 * count, real=True))[:count]
    return np.asarray(products / products[0])
