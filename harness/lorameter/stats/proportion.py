"""Estimates a proportion with its interval, such as the share of answers that differ.

Clopper & Pearson (1934) invert the binomial test, so the interval keeps its coverage even for zero out of few, for
which the normal approximation gives "0 % [0 %, 0 %]". Clustered counts (the tokens of one answer, which are wrong
together) correspond to fewer independent trials; Korn & Graubard (1998, "Confidence intervals for proportions with
small expected number of positive counts estimated from survey data", Survey Methodology 24, 193–201) use that smaller
number in the same formula. If the count is zero or the total, the clusters show no variance, and each cluster counts as
one trial, which is conservative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorameter.stats.intervals import quantile


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
        raise ValueError(f"{count} of {of}: pass a part of something")
