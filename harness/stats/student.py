"""Student's t and its noncentral companion: the two quantiles that every interval and every power statement rests on.

Student (1908) for the interval; for power the noncentral t, as in Cohen (1988, chapter 2): a test whose statistic has
the noncentrality `effect / standard error` clears its critical value with a probability that grows with it. A
percentile bootstrap is not offered: at 3 to 5 replicates it raised 6 to 11 % false alarms where 2.5 % are promised.
"""

from __future__ import annotations

# Beyond this t is the normal distribution to six digits, and scipy's noncentral t is spared sizes at which it loses
# digits.
_NORMAL_DF = 1e6


def quantile(df: float, tail: float) -> float:
    """The t value that is exceeded with probability `tail` (0 < tail < 1) at `df` degrees of freedom."""
    from scipy.special import stdtrit

    # By symmetry, from the lower tail: `1 - tail` would round a small one away.
    return -float(stdtrit(min(df, _NORMAL_DF), tail))


def noncentrality(df: float, tail: float, power: float) -> float:
    """How many standard errors an effect must measure for `T > quantile(df, tail)` to hold with probability `power`."""
    from scipy.special import nctdtrinc

    df = min(df, _NORMAL_DF)
    return float(nctdtrinc(df, 1 - power, max(quantile(df, tail), 0.0)))
