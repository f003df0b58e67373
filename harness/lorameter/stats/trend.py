"""Contrasts over the ordered levels of an axis: one number per replicate for the statement of a claim.

Replicates are blocks: each contains every level, so common effects (the seed, the state of the machine) cancel in a
contrast, whose weights sum to zero. Contrasts are computed within each replicate before the scatter over replicates, so
no assumption is made about the correlation or the equality of the levels' noise. The inputs are logs, so a contrast is
the log of a ratio.

The share of the scatter of one quantity that another explains is the squared correlation within a replicate: the share
of the variance of y that a straight line in x explains. Its interval is Student's t over replicates, clipped to [0, 1].

`judge_above` and `judge_within` test whether the data support a statement, refute it, or are inconclusive.

A statement has one limit and two sides: `judge_above` says that a contrast is larger than the limit, `judge_within`
that it is not, in either direction. Support asserts one side and refutation the other, so more data cannot turn a true
refutation into support; with one limit for "different" and a wider one for "equal", both could hold between the limits.

There are two kinds of assertions, as in `lorameter.stats.verdict`. A difference is asserted by the (1 - alpha/family)
interval, whose error rate the statements of a run share (`lorameter.stats.holm_step_down`). Equality is asserted by two
one-sided tests (Schuirmann 1987) at alpha: a false equality is an error of one statement.

A statement may be about several contrasts. It holds if it holds for all of them, and then each is tested at the full
rate, since a single false contrast decides (intersection-union, Berger 1982). To refute it by the worst contrast, that
contrast must pass at the rate divided by their number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lorameter.stats.effect import ROUNDING, Effect, paired_effect
from lorameter.stats.intervals import Estimate, mean_interval
from lorameter.stats.samples import Array
from lorameter.stats.verdict import replicates_to_clear

Scale = Literal["log", "linear"]


def line_change(logs: Array, levels: Sequence[float], scale: Scale) -> Array:
    """The change of the least-squares line through each replicate's levels, from the first level to the last.

    `logs` is replicates × levels. The levels differ, and are above zero where `scale` is "log", which places them by
    their logarithms. With two levels it is their difference. A line uses every level, so a rising value can be
    distinguished from one that scatters; a curvature is not detected.
    """
    import numpy as np

    positions = np.log2(levels) if scale == "log" else np.asarray(levels)
    centred = positions - positions.mean()
    weights = centred / (centred @ centred) * (positions[-1] - positions[0])
    return np.asarray(logs @ weights)


def change_magnitudes(changes: Array) -> Array:
    """Magnitudes of changes: each replicate's change in the direction of the mean change.

    Absolute values would turn the scatter around a zero change into a magnitude.
    """
    import numpy as np

    return np.asarray(changes * np.sign(changes.mean()))


MIN_POINTS = 3  # every line fits two


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareEstimate(Estimate):
    """A share with its 95 % interval over replicates."""

    replicates: int
    points: int
    """Number of points (x, y) of all replicates together."""


def explained_share(blocks: Sequence[tuple[Sequence[float], Sequence[float]]]) -> ShareEstimate | None:
    """R² of y on x, from one pair (x, y) per replicate; None if no replicate is informative.

    A replicate is not informative with fewer than three points, or if x or y is constant. Raises ValueError for x and y
    of unequal length.
    """
    import numpy as np

    pairs = [(np.asarray(x, dtype=float), np.asarray(y, dtype=float)) for x, y in blocks]
    informative = [(x, y) for x, y in pairs if x.size >= MIN_POINTS and x.max() > x.min() and y.max() > y.min()]
    if not informative:
        return None
    mean = mean_interval([float(np.corrcoef(x, y)[0, 1] ** 2) for x, y in informative])
    return ShareEstimate(
        value=mean.value,
        low=None if mean.low is None else max(0.0, mean.low),
        high=None if mean.high is None else min(1.0, mean.high),
        replicates=len(informative),
        points=sum(x.size for x, _ in informative),
    )


Support = Literal["supported", "refuted", "inconclusive"]
By = Literal["difference", "equality", ""]


@dataclass(frozen=True, slots=True)
class Conclusion:
    """The conclusion on a statement, with the contrast that decided, or that is inconclusive."""

    status: Support
    by: By
    """The assertion that decided; empty if inconclusive."""
    contrast: int
    """Index of the contrast."""
    effect: Effect
    """The contrast over replicates; a log of a ratio."""
    tail: float
    """Error rate on each side of the interval that decided, or failed to decide."""
    replicates_needed: int | None = None
    """For an inconclusive statement: replicates that would decide it with 80 % power if the undecided contrast has its
    estimated value; None if no practical number suffices, and for a decided statement."""


def judge_above(contrasts: Array, limit: float, *, alpha: float = 0.05, family: int = 1) -> Conclusion:
    """Test the statement that every contrast is above `limit` (a log ratio >= 0); `contrasts` is replicates ×
    contrasts.

    supported: the corrected interval of each contrast is above the limit · refuted: the interval of one contrast, also
    corrected for their number, is below it, or all are equal within the limit · else inconclusive, as with one
    replicate.
    """
    effects = [paired_effect(column, "replicate") for column in contrasts.T]
    tail = alpha / family / 2
    low, weakest = min((effect.interval(tail)[0], index) for index, effect in enumerate(effects))
    if low > limit + ROUNDING:
        return Conclusion("supported", "difference", weakest, effects[weakest], tail)
    shared = tail / len(effects)
    high, below = min((effect.interval(shared)[1], index) for index, effect in enumerate(effects))
    if high < limit - ROUNDING:
        return Conclusion("refuted", "difference", below, effects[below], shared)
    distance, furthest = _furthest(effects, alpha)
    if distance < limit:
        return Conclusion("refuted", "equality", furthest, effects[furthest], alpha)
    clearance = effects[weakest].log_ratio - limit
    return _undecided(weakest, effects[weakest], tail, clearance, tail if clearance > 0 else shared)


def judge_within(contrasts: Array, limit: float, *, alpha: float = 0.05, family: int = 1) -> Conclusion:
    """Test the statement that every contrast is at most `limit` (a log ratio) from zero, in either direction.

    supported: the (1 - 2 alpha) interval of each contrast is inside · refuted: the corrected interval of one contrast,
    also corrected for their number, is outside · else inconclusive.
    """
    effects = [paired_effect(column, "replicate") for column in contrasts.T]
    distance, furthest = _furthest(effects, alpha)
    if distance < limit:
        return Conclusion("supported", "equality", furthest, effects[furthest], alpha)
    shared = alpha / family / 2 / len(effects)
    intervals = [effect.interval(shared) for effect in effects]
    nearest, outside = max((max(low, -high), index) for index, (low, high) in enumerate(intervals))
    if nearest > limit + ROUNDING:
        return Conclusion("refuted", "difference", outside, effects[outside], shared)
    clearance = limit - abs(effects[furthest].log_ratio)
    return _undecided(furthest, effects[furthest], alpha, clearance, alpha if clearance > 0 else shared)


def _furthest(effects: Sequence[Effect], tail: float) -> tuple[float, int]:
    """The largest distance from zero within an interval, and the index of the effect."""
    return max((max(map(abs, effect.interval(tail))), index) for index, effect in enumerate(effects))


def negate(conclusion: Conclusion) -> Conclusion:
    """The conclusion on the statement's negation."""
    swapped: dict[Support, Support] = {"supported": "refuted", "refuted": "supported", "inconclusive": "inconclusive"}
    return dataclasses.replace(conclusion, status=swapped[conclusion.status])


def _undecided(index: int, effect: Effect, tail: float, clearance: float, decisive: float) -> Conclusion:
    """An inconclusive statement: `clearance` is the distance from the contrast to the limit, `decisive` the tail of the
    interval that would clear the limit on the contrast's side."""
    needed = None
    if clearance and effect.spread is not None:
        needed = replicates_to_clear(abs(clearance), effect.spread.sd, decisive)
    return Conclusion("inconclusive", "", index, effect, tail, needed)
