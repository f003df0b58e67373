"""Estimates the effect of a candidate, one log ratio per replicate with their scatter, and the value of one variant.

Times are compared as ratios, so the arithmetic is done on logs: this gives a correct interval for the ratio (Kalibera &
Jones 2013), and base and candidate are interchangeable. Pairing removes effects common to both sides of a replicate.
Measured on a noisy machine, the standard deviation of the log ratio of two identical builds falls from 37 % unpaired to
27 % paired by process and to 2 % paired turn by turn.

Unpaired sides use Welch's interval (Welch 1947), with unequal variances and the corresponding degrees of freedom.

A run shares the scatter of its arms. With three replicates a comparison estimates its own variance with two degrees of
freedom, and the 99 % quantile of Student's t is then 9.9 standard errors. Arms of one run are measured on one machine
in the same turns, so the variance of each arm is informative about the others. The variance of an arm is estimated from
the two-way layout of replicates and arms (Grubbs 1948, J. Am. Stat. Assoc. 43), in which effects of a replicate on all
arms cancel. It is shrunk towards the mean variance of the arms, as if that mean were known with `PRIOR_DF` degrees of
freedom (moderated t: Smyth 2004, doi 10.2202/1544-6115.1027). It is never reduced below its own estimate: an arm that
scatters more keeps its own variance. The comparisons share the reference, so their family uses Dunnett's critical value
(Dunnett 1955, J. Am. Stat. Assoc. 50).

Smyth estimates the prior degrees of freedom from thousands of variances. With three to fifteen variances that estimate
is too large: simulated family coverage fell to 81 to 92 % (docs/method.md). So the prior is a small constant.

The value of one variant is estimated from the medians of its trials, with the interval of Student's t over trials,
because the process and not the sample is the independent unit. It is on the log scale too, since times and sizes
scatter by factors: the centre is the geometric mean of the medians, and the interval cannot reach below zero.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar

from lorameter.stats.intervals import Estimate, mean_interval, quantile
from lorameter.stats.samples import Array, checked_trials, trial_medians

Pairing = Literal["none", "replicate", "turn"]
Scale = Literal["log", "linear"]
"""What a comparison is of: ratios, whose logs are averaged, or differences in the unit of the samples."""

# Logs of durations have a rounding error of about 1e-15; a smaller scatter counts as zero.
ROUNDING = 1e-12
_LOG_LARGEST = math.log(sys.float_info.max)
PRIOR_DF = 3
"""Degrees of freedom of the mean variance as a prior: the largest integer for which the simulated family coverage stays
at 94 % (93.9 % in the worst case) if one arm scatters five times as much as the others."""

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The scatter of log ratios over replicates, as needed for an interval or for a plan of the next run."""

    standard_error: float
    """Standard error of the mean log ratio; 0 if the replicates do not differ."""
    df: float
    """Degrees of freedom of `standard_error`."""
    sd: float
    """Standard deviation of one replicate's log ratio: with n replicates (per side) the standard error is `sd /
    sqrt(n)`."""
    df_per_replicate: float
    """Degrees of freedom gained by one more replicate (per side): 1 if paired, between 1 and 2 if unpaired."""
    prior_df: float = 0.0
    """Degrees of freedom from the other comparisons of the run (`share_scatter`)."""
    shared_by: int = 0
    """Number of comparisons that share this scatter; 0 if it is the comparison's own."""

    def half_width(self, tail: float) -> float:
        """Half the interval with error rate `tail` on each side, on the log scale."""
        return max(quantile(self.df, tail), 0.0) * self.standard_error


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """The log ratio of candidate to base, over replicates; on the linear scale, candidate minus base instead."""

    log_ratio: float
    replicates: int
    """Number of pairs, or the smaller number of trials if the sides are not paired."""
    spread: Spread | None
    """None with one replicate, which gives no information about the scatter."""
    pairing: Pairing
    log_ratios: tuple[float, ...] = ()
    """The value of each replicate; empty if the sides are not paired."""

    def interval(self, tail: float) -> tuple[float, float]:
        """Both ends of the interval with the error rate `tail` on each side; infinite with one replicate."""
        half = math.inf if self.spread is None else self.spread.half_width(tail)
        return self.log_ratio - half, self.log_ratio + half


def from_log(value: float) -> float | None:
    """The exponential, or None if it exceeds the range of a float (JSON has no infinity)."""
    return math.exp(value) if value < _LOG_LARGEST else None


def estimate_effect(
    base: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]], pairing: Pairing, scale: Scale = "log"
) -> Effect:
    """The effect, from the samples of each trial.

    Raises ValueError for samples that are not finite or, on the log scale, not above zero, for paired sides with
    different numbers of trials or, paired by turn, of samples in a pair, and for a ratio beyond the range of a float.
    """
    ours, theirs = (
        checked_trials(side, trials, positive=scale == "log")
        for side, trials in (("base", base), ("candidate", candidate))
    )
    if pairing == "none":
        effect = _unpaired(*(_medians(trials, scale) for trials in (ours, theirs)))
    else:
        effect = paired_effect(log_ratios(ours, theirs, pairing, scale), pairing)
    if scale == "linear":
        return effect
    if not (math.isfinite(effect.log_ratio) and from_log(effect.log_ratio)):
        raise ValueError(
            f"the log ratio of candidate to base is {effect.log_ratio:g}, too large for a float: check the units"
        )
    return effect


def log_ratios(base: Sequence[Array], candidate: Sequence[Array], pairing: Pairing, scale: Scale = "log") -> Array:
    """The log ratio of candidate to base in each replicate, for sides that are paired by replicate or by turn; on the
    linear scale the difference.

    Raises ValueError as `estimate_effect` does.
    """
    if len(base) != len(candidate):
        raise ValueError(
            f"base has {len(base)} trials and candidate {len(candidate)}: pairing {pairing!r} needs one of each per "
            "replicate; if a replicate failed on one side, omit it on both, or pass pairing='none'"
        )
    if pairing == "replicate":
        return _medians(candidate, scale) - _medians(base, scale)
    return _effects_by_turn(base, candidate, scale)


def _on_scale(values: Array, scale: Scale) -> Array:
    import numpy as np

    return np.asarray(np.log(values)) if scale == "log" else values


def _medians(trials: Sequence[Array], scale: Scale) -> Array:
    return _on_scale(trial_medians(trials), scale)


def _effects_by_turn(base: Sequence[Array], candidate: Sequence[Array], scale: Scale) -> Array:
    """The value of each replicate: the median of its log ratios or differences, sample by sample."""
    ratios = []
    for index, (ours, theirs) in enumerate(zip(base, candidate, strict=True)):
        if ours.size != theirs.size:
            raise ValueError(
                f"trial {index}: base has {ours.size} samples and candidate {theirs.size}: pairing 'turn' pairs them "
                "one by one; drop the samples of the turns that one side missed, or pass pairing='replicate'"
            )
        ratios.append(_on_scale(theirs, scale) - _on_scale(ours, scale))
    return trial_medians(ratios)


def paired_effect(values: Array, pairing: Pairing) -> Effect:
    """The effect over replicates, from one log ratio (or any other contrast) per replicate."""
    spread = None
    if values.size > 1:
        sd = _sd(values)
        spread = Spread(standard_error=sd / math.sqrt(values.size), df=values.size - 1, sd=sd, df_per_replicate=1.0)
    return Effect(
        log_ratio=float(values.mean()),
        replicates=int(values.size),
        spread=spread,
        pairing=pairing,
        log_ratios=tuple(values.tolist()),
    )


def _unpaired(base: Array, candidate: Array) -> Effect:
    spread = None
    if min(base.size, candidate.size) > 1:
        spread = _welch(_sd(base) ** 2, base.size, _sd(candidate) ** 2, candidate.size)
    return Effect(
        log_ratio=float(candidate.mean() - base.mean()),
        replicates=min(base.size, candidate.size),
        spread=spread,
        pairing="none",
    )


def mean_difference(base: Array, candidate: Array, pairing: Pairing) -> Effect:
    """The candidate minus the base, of one value per trial. Raises ValueError for paired sides of unequal size."""
    return _unpaired(base, candidate) if pairing == "none" else paired_effect(candidate - base, "replicate")


def _welch(variance_base: float, count_base: int, variance_candidate: float, count_candidate: int) -> Spread:
    """Welch's standard error, with the degrees of freedom of Satterthwaite (1946)."""
    error_base, error_candidate = variance_base / count_base, variance_candidate / count_candidate
    error, variance = error_base + error_candidate, variance_base + variance_candidate
    if error == 0:
        return Spread(standard_error=0.0, df=count_base + count_candidate - 2, sd=0.0, df_per_replicate=2.0)
    # Shares instead of squared variances, which underflow for very stable trials.
    df = 1 / ((error_base / error) ** 2 / (count_base - 1) + (error_candidate / error) ** 2 / (count_candidate - 1))
    gain = 1 / ((variance_base / variance) ** 2 + (variance_candidate / variance) ** 2)
    return Spread(standard_error=math.sqrt(error), df=df, sd=math.sqrt(variance), df_per_replicate=gain)


def _sd(values: Array) -> float:
    sd = float(values.std(ddof=1))
    return sd if sd > ROUNDING else 0.0


# --- shared scatter ---------------------------------------------------------------------------------------------------


def share_scatter(effects: Mapping[K, Effect]) -> dict[K, Effect]:
    """Give effects with a common reference their shared scatter; a single effect, or one with one replicate, is
    unchanged.

    Each effect must have its log ratios (`Effect.log_ratios`), with the same replicates in the same order. Raises
    ValueError for effects with different numbers of log ratios.
    """
    import numpy as np

    if len(effects) < 2 or all(len(effect.log_ratios) < 2 for effect in effects.values()):
        return dict(effects)
    columns = np.column_stack([effect.log_ratios for effect in effects.values()])
    variances, prior_df = _comparison_variances(columns)
    return {
        name: dataclasses.replace(effect, spread=_spread(float(variance), columns.shape[0], prior_df, len(effects)))
        for (name, effect), variance in zip(effects.items(), variances, strict=True)
    }


def _spread(variance: float, replicates: int, prior_df: float, comparisons: int) -> Spread:
    sd = math.sqrt(variance)
    sd = sd if sd > ROUNDING else 0.0
    return Spread(
        standard_error=sd / math.sqrt(replicates),
        df=replicates - 1 + prior_df,
        sd=sd,
        df_per_replicate=1.0,
        prior_df=prior_df,
        shared_by=comparisons,
    )


def _comparison_variances(log_ratios: Array) -> tuple[Array, float]:
    """The per-replicate variance of each column's log ratio, and the prior degrees of freedom.

    `log_ratios` is replicates × comparisons, each against the same reference, which is the first arm of the layout.
    """
    import numpy as np

    replicates, comparisons = log_ratios.shape
    arms = comparisons + 1
    values = np.column_stack([np.zeros(replicates), log_ratios])
    residuals = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    squares = (residuals**2).sum(axis=0) / (replicates - 1)
    mean = squares.sum() / (arms - 1)
    own = np.maximum((squares - mean / arms) * arms / (arms - 2), 0.0)
    prior_df = min(PRIOR_DF, (arms - 2) * (replicates - 1))
    moved = (prior_df * mean + (replicates - 1) * own) / (prior_df + replicates - 1)
    variances = np.maximum(moved, own)
    return variances[1:] + variances[0], float(prior_df)


@lru_cache(maxsize=4096)
def dunnett_tail(df: float, alpha: float, family: int) -> float:
    """The one-sided error rate of an interval if `family` comparisons share a reference and the error rate `alpha`.

    It is the tail probability of Student's t with `df` degrees of freedom beyond Dunnett's two-sided critical value for
    arms of equal size, whose comparisons have the correlation 1/2.
    """
    from scipy.special import stdtr

    if family == 1:
        return alpha / 2
    low, high = quantile(df, alpha / 2), quantile(df, alpha / family / 2)  # a single comparison, and Bonferroni's bound
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, df, family) < 1 - alpha else (low, middle)
    return float(stdtr(df, -high))


def _inside(critical: float, df: float, family: int) -> float:
    """The probability that no |T| of `family` comparisons with a shared reference exceeds `critical`."""
    import numpy as np
    from scipy.special import chdtri, ndtr

    points, weights = np.polynomial.hermite_e.hermegauss(60)
    scales = np.sqrt(chdtri(df, (np.arange(200) + 0.5) / 200) / df)[:, None]
    reach = math.sqrt(2) * critical * scales
    inside = (ndtr(points + reach) - ndtr(points - reach)) ** family
    return float((inside * weights).sum(axis=1).mean() / math.sqrt(2 * math.pi))


# --- values of one variant --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialsEstimate(Estimate):
    """The geometric mean of the trials' medians (with blocks, of the block values) with its interval over replicates;
    the arithmetic mean if a median is zero or negative."""

    replicates: int
    samples: int
    """Number of samples of all trials; more samples do not narrow the interval."""


def estimate_trials(
    trials: Sequence[Sequence[float]], *, alpha: float = 0.05, blocks: Sequence[str] | None = None
) -> TrialsEstimate:
    """The estimate from a list of samples for each trial.

    `blocks` names the block of each trial, such as its machine. Trials of one block are not independent, so with two or
    more blocks each block counts as one value, the mean of its trials. Treating eight trials on four machines as
    independent gave 95 % intervals that covered the true mean in only 81 of 100 simulated runs, with a scatter between
    machines of three times that between trials.

    With one replicate `low` and `high` are None, however many samples it has. If any trial's median is zero or negative
    (a loss can be), the centre and the interval are computed on the linear scale.

    Raises ValueError, naming the trial and sample, for an empty list or trial and for NaN or infinite samples; and for
    values whose mean overflows.
    """
    import numpy as np

    arrays = checked_trials("trials", trials, positive=False)
    with np.errstate(over="ignore", invalid="ignore"):
        medians = trial_medians(arrays)
        logs = bool((medians > 0).all())
        values = np.log(medians) if logs else medians
        if blocks is not None and len(named := sorted(set(blocks))) > 1:
            values = np.array([values[np.equal(blocks, name)].mean() for name in named])
        mean = mean_interval(values, alpha=alpha)
    ends = (mean.value, mean.low, mean.high)
    value, low, high = (from_log(end) if logs and end is not None else end for end in ends)
    value = float(medians[0]) if medians.size == 1 else value
    if value is None or not all(math.isfinite(number) for number in (value, low or 0, high or 0)):
        raise ValueError(f"the trials' medians, up to {np.abs(medians).max():g}, have no finite sum: check the units")
    return TrialsEstimate(
        value=value, low=low, high=high, replicates=len(arrays), samples=sum(array.size for array in arrays)
    )
