"""Quantiles of Student's t and of the noncentral t, on which all intervals and power statements are based.

Intervals use Student (1908); power uses the noncentral t, as in Cohen (1988, chapter 2): a test statistic with the
noncentrality `effect / standard error` exceeds its critical value with a probability that grows with it. There is no
bootstrap over replicates: with 3 to 5 replicates its percentile interval gave 6 to 11 % false alarms instead of the
nominal 2.5 %.

The sign test (Dixon & Mood 1946) tests whether a coin is fair, given its number of heads. The bootstrap resamples turns
for the interval of a quantity computed from several medians of the same turns: order statistics give the interval of a
single median, but not of a difference of medians of paired samples (Efron 1979).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

# Beyond this, t is the normal distribution to six digits, and scipy's noncentral t would lose digits.
_NORMAL_DF = 1e6
# Beyond this critical value (one or two degrees of freedom, a tiny tail) scipy's inverse loses digits and then hangs.
# There the scatter of the mean is negligible compared with that of its standard error, and the chi distribution is
# used.
_LARGE_T = 1000.0
# Calibration and families repeat the same few calls thousands of times.
_REMEMBERED = 4096


@lru_cache(maxsize=_REMEMBERED)
def quantile(df: float, tail: float) -> float:
    """The t value that is exceeded with probability `tail` (0 < tail < 1) at `df` degrees of freedom."""
    from scipy.special import stdtrit

    # By symmetry from the lower tail, because `1 - tail` would lose a small tail to rounding.
    return -float(stdtrit(min(df, _NORMAL_DF), tail))


@lru_cache(maxsize=_REMEMBERED)
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


def mean_interval(
    values: Sequence[float] | NDArray[float64], *, alpha: float = 0.05
) -> tuple[float, float | None, float | None]:
    """The mean of independent values on the linear scale, with both ends of Student's (1 - alpha) interval, which are
    None for a single value. Negative values and zeros are allowed, such as differences of pairs.

    Raises ValueError without values.
    """
    import numpy as np

    if not len(values):
        raise ValueError("no value: pass one at least")
    mean = float(np.mean(values))
    if len(values) == 1:
        return mean, None, None
    half_width = quantile(len(values) - 1, alpha / 2) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - half_width, mean + half_width


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
