"""Intervals of means, quantiles and proportions, and the quantiles of Student's t on which they and all power
statements are based.

Intervals of means use Student (1908); power uses the noncentral t, as in Cohen (1988, chapter 2): a test statistic with
the noncentrality `effect / standard error` exceeds its critical value with a probability that grows with it. There is
no bootstrap over replicates: with 3 to 5 replicates its percentile interval gave 6 to 11 % false alarms instead of the
nominal 2.5 %.

The sign test (Dixon & Mood 1946) tests whether a coin is fair, given its number of heads. The bootstrap resamples turns
for the interval of a quantity computed from several medians of the same turns: order statistics give the interval of a
single median, but not of a difference of medians of paired samples (Efron 1979).

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

Clopper & Pearson (1934) invert the binomial test, so the interval keeps its coverage even for zero out of few, for
which the normal approximation gives "0 % [0 %, 0 %]". Clustered counts (the tokens of one answer, which are wrong
together) correspond to fewer independent trials; Korn & Graubard (1998, "Confidence intervals for proportions with
small expected number of positive counts estimated from survey data", Survey Methodology 24, 193–201) use that smaller
number in the same formula. If the count is zero or the total, the clusters show no variance, and each cluster counts as
one trial, which is conservative.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lorameter.stats.samples import Array, checked_samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value with its interval, in the unit of the samples."""

    value: float
    low: float | None
    """Lower end; None if there are too few values for an interval."""
    high: float | None
    """Upper end; None if there are too few values, or if it exceeds the range of a float."""


# Beyond this, t is the normal distribution to six digits, and scipy's noncentral t would lose digits.
_NORMAL_DF = 1e6
# Beyond this critical value (one or two degrees of freedom, a tiny tail) scipy's inverse loses digits and then hangs.
# There the scatter of the mean is negligible compared with that of its standard error, and the chi distribution is
# used.
_LARGE_T = 1000.0
# Calibration and families repeat the same few calls thousands of times.
_CACHE_SIZE = 4096


@lru_cache(maxsize=_CACHE_SIZE)
def quantile(df: float, tail: float) -> float:
    """The t value that is exceeded with probability `tail` (0 < tail < 1) at `df` degrees of freedom."""
    from scipy.special import stdtrit

    # By symmetry from the lower tail, because `1 - tail` would lose a small tail to rounding.
    return -float(stdtrit(min(df, _NORMAL_DF), tail))


@lru_cache(maxsize=_CACHE_SIZE)
def noncentrality(df: float, tail: float, power: float) -> float:
    """The effect, in standard errors, for which `T > quantile(df, tail)` holds with probability `power`."""
    from scipy.special import chdtri, nctdtrinc

    df = min(df, _NORMAL_DF)
    critical = max(quantile(df, tail), 0.0)
    if critical > _LARGE_T:
        return critical * math.sqrt(float(chdtri(df, 1 - power)) / df)
    return float(nctdtrinc(df, 1 - power, critical))


def sign_test(heads: int, tosses: int) -> float:
    """The exact two-sided p-value of `heads` in `tosses`; 1 for no tosses.

    Uses `scipy.special`, because importing `scipy.stats` for one binomial sum takes half a second.
    """
    from scipy.special import bdtr

    if tosses == 0:
        return 1.0
    return min(1.0, 2 * float(bdtr(min(heads, tosses - heads), tosses, 0.5)))


def mean_interval(values: Sequence[float] | Array, *, alpha: float = 0.05) -> Estimate:
    """The mean of independent values on the linear scale, with Student's (1 - alpha) interval; a single value has none.
    Negative values and zeros are allowed, such as differences of pairs.

    Raises ValueError without values.
    """
    import numpy as np

    if not len(values):
        raise ValueError("no value: pass at least one")
    mean = float(np.mean(values))
    if len(values) == 1:
        return Estimate(value=mean, low=None, high=None)
    half_width = quantile(len(values) - 1, alpha / 2) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Estimate(value=mean, low=mean - half_width, high=mean + half_width)


def sd_interval(sd: float, df: float, *, alpha: float = 0.05) -> tuple[float, float]:
    """The (1 - alpha) interval of a standard deviation of normal values with `df` degrees of freedom (chi-square)."""
    from scipy.special import chdtri

    return (
        sd * math.sqrt(df / float(chdtri(df, alpha / 2))),
        sd * math.sqrt(df / float(chdtri(df, 1 - alpha / 2))),
    )


RESAMPLES = 2000


def bootstrap_interval(
    columns: Sequence[Sequence[float]], statistic: Callable[..., Any], *, alpha: float = 0.05
) -> tuple[float | None, float | None]:
    """Both ends of the two-sided (1 - alpha) interval of `statistic(*columns)`; None if there are fewer than 6 rows.

    Args:
        columns: arrays of the same length; values at the same index are resampled together.
        statistic: function of arrays with the keyword argument `axis`.
        alpha: error rate.

    Raises ValueError for columns of different lengths.
    """
    from scipy.stats import bootstrap

    if len(columns[0]) < 6:
        return None, None
    found = bootstrap(
        tuple(columns), statistic, paired=True, vectorized=True, method="percentile", n_resamples=RESAMPLES,
        confidence_level=1 - alpha, rng=0,
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


# Smaller relative differences are rounding errors: in probabilities, and in deviations from a mean, whose correlation
# would be meaningless.
_ROUNDING = 1e-12


def median_interval(values: Sequence[float], *, alpha: float = 0.05) -> Estimate:
    """The median of independent values (one a process) with its two-sided (1 - alpha) interval.

    There is no interval if even the smallest and the largest value do not bracket the median with that confidence (95 %
    needs 6 values). Raises ValueError without values, and for values that are not finite.
    """
    found = percentile(values, 0.5, confidence=1 - alpha / 2)
    return found or Estimate(value=float(statistics.median(values)), low=None, high=None)


def percentile(
    samples: Sequence[float], q: float, *, confidence: float = 0.95, effective_size: float | None = None
) -> Estimate | None:
    """The quantile `q` (a fraction: 0.99 for p99) with a lower and an upper bound, each of this one-sided confidence.

    `effective_size` is the equivalent number of independent samples (`lorameter.stats.effective_size`), at most the
    number of samples; it determines the width of the bounds. None if it is too small for the quantile (with 95 %, p90
    needs 29, p95 59, p99 299). Raises ValueError without samples, and for samples that are not finite.
    """
    import numpy as np

    ordered = np.sort(checked_samples("samples", samples, positive=False))
    size = ordered.size if effective_size is None else min(ordered.size, math.floor(effective_size))
    if size < _min_samples(q, 1 - confidence):
        return None
    low, high = _ranks(size, q, 1 - confidence)
    # The ranks are for `size` independent samples; they are rounded outwards to ranks among all samples.
    every = ordered.size
    return Estimate(
        value=float(np.quantile(ordered, q)),
        low=float(ordered[(low - 1) * every // size]),
        high=float(ordered[-(-high * every // size) - 1]),
    )


def _min_samples(q: float, tail: float) -> int:
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


def _autocorrelations(deviations: Array) -> Array:
    """Autocorrelations at lags 0 to n - 1, each divided by n: the biased estimate, which decays; O(n log n)."""
    import numpy as np
    from scipy import fft

    count = deviations.size
    spectrum = fft.rfft(deviations, fft.next_fast_len(2 * count, real=True))
    products = fft.irfft(np.abs(spectrum) ** 2, fft.next_fast_len(2 * count, real=True))[:count]
    return np.asarray(products / products[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Proportion:
    """`count` of `of`, and the two-sided interval of their ratio, a fraction."""

    count: int
    of: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """The ratio, a fraction."""
        return self.count / self.of


def proportion(count: int, of: int, *, alpha: float = 0.05) -> Proportion:
    """The proportion of independent trials: Clopper & Pearson's interval at the level 1 - alpha.

    Raises ValueError for a total of zero, and for a count outside 0 to the total.
    """
    _check(count, of)
    low, high = _interval(count, of, alpha)
    return Proportion(count=count, of=of, low=low, high=high)


def clustered_proportion(counts: Sequence[int], of: Sequence[int], *, alpha: float = 0.05) -> Proportion:
    """The proportion of clustered trials: Korn & Graubard's interval at the level 1 - alpha.

    Args:
        counts: count in each cluster.
        of: trials in each cluster, at least one.
        alpha: error rate.

    Raises ValueError without clusters, for lists of different lengths, and in the cases of `proportion`.
    """
    for pair in zip(counts, of, strict=True):
        _check(*pair)
    count, whole = sum(counts), sum(of)
    _check(count, whole)
    effective_trials = _effective(counts, of, alpha)
    low, high = _interval(count / whole * effective_trials, effective_trials, alpha)
    return Proportion(count=count, of=whole, low=low, high=high)


def _effective(counts: Sequence[int], of: Sequence[int], alpha: float) -> float:
    """The equivalent number of independent trials: the binomial variance over the observed variance between clusters,
    with a penalty for estimating the latter from few clusters."""
    clusters, whole = len(of), sum(of)
    share = sum(counts) / whole
    if clusters == 1 or share in (0, 1):
        return float(clusters)
    scatter = sum((count - share * size) ** 2 for count, size in zip(counts, of, strict=True))
    if scatter == 0:
        return float(whole)
    variance = clusters / (clusters - 1) * scatter / whole**2
    penalty = (quantile(max(1, whole - 1), alpha / 2) / quantile(clusters - 1, alpha / 2)) ** 2
    return min(float(whole), share * (1 - share) / variance * penalty)


def _interval(count: float, of: float, alpha: float) -> tuple[float, float]:
    from scipy.special import betainccinv, betaincinv

    low = 0.0 if count <= 0 else float(betaincinv(count, of - count + 1, alpha / 2))
    high = 1.0 if count >= of else float(betainccinv(count + 1, of - count, alpha / 2))
    return low, high


def _check(count: int, of: int) -> None:
    if of < 1 or not 0 <= count <= of:
        raise ValueError(f"{count} of {of}: the count must be between 0 and the total, and the total at least 1")
