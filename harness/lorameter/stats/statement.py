"""Does the data support a statement, refute it, or leave it open?

A statement has one limit and two sides: `beyond` says that something is larger than the limit, `within` that it is not,
in either direction. Support asserts one side, refutation the other, so no more data can turn a true refutation into
support; a limit for "different" and a wider one for "equal" would leave a gap in which both hold.

Two kinds of assertion, as in `lorameter.stats.verdict`. That there *is* a difference needs the (1 - alpha/family)
interval, which the statements of a run share (`lorameter.stats.step_down`). That there is *none* needs two tests, each
on one side (Schuirmann 1987), at alpha: calling too much equal is an error of each statement.

A statement may be about several contrasts. It holds if it does for all of them, and then testing each at the full rate
is enough, since the one that is false decides (intersection-union, Berger 1982). To refute it by the one that looks
worst, that one must pass at the rate divided by their number.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lorameter.stats.effect import ROUNDING, Spread, paired_effect
from lorameter.stats.power import replicates_to_clear

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

Support = Literal["supported", "refuted", "inconclusive"]
By = Literal["difference", "equality", ""]

_SHOWN_TAIL = 0.025


@dataclass(frozen=True, slots=True, kw_only=True)
class Conclusion:
    """The conclusion on a statement, with the contrast that decided; all numbers are logs of ratios."""

    status: Support
    by: By
    """What was asserted; empty where nothing was."""
    contrast: int
    """Index of the contrast that decided, or that is undecided."""
    estimate: float
    """Mean of that contrast over replicates."""
    low: float
    """Lower end of its 95 % interval, which is corrected for nothing."""
    high: float
    """Upper end."""
    decided_low: float
    """Lower end of the interval that decided, or that failed to."""
    decided_high: float
    """Upper end."""
    level: float
    """Coverage of that interval."""
    replicates: int
    replicates_needed: int | None = None
    """Of an open statement: how many would decide it with 80 % power if the undecided contrast is what it
    looks like; None where no practical number would, and of one that is decided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Contrast:
    """One contrast over replicates, and its index."""

    index: int
    mean: float
    spread: Spread
    replicates: int

    def low(self, tail: float) -> float:
        return self.mean - self.spread.half_width(tail)

    def high(self, tail: float) -> float:
        return self.mean + self.spread.half_width(tail)

    def nearest(self, tail: float) -> float:
        """The least distance from zero that the interval leaves; negative where it holds zero."""
        return abs(self.mean) - self.spread.half_width(tail)

    def furthest(self, tail: float) -> float:
        """The greatest distance from zero that the interval leaves."""
        return abs(self.mean) + self.spread.half_width(tail)


def beyond(contrasts: NDArray[float64], limit: float, *, alpha: float = 0.05, family: int = 1) -> Conclusion:
    """The statement that every contrast is above `limit` (a log ratio >= 0); `contrasts` is replicates × contrasts.

    supported: the corrected interval of each lies above the limit · refuted: that of one, corrected for their number
    too, lies below it, or all are equal within the limit · else inconclusive.
    Raises ValueError for fewer than two replicates and for values that are not finite.
    """
    found = _checked(contrasts)
    tail = alpha / family / 2
    weakest = min(found, key=lambda one: one.low(tail))
    if weakest.low(tail) > limit + ROUNDING:
        return _conclude("supported", "difference", weakest, tail)
    shared = tail / len(found)
    below = min(found, key=lambda one: one.high(shared))
    if below.high(shared) < limit - ROUNDING:
        return _conclude("refuted", "difference", below, shared)
    widest = max(found, key=lambda one: one.furthest(alpha))
    if widest.furthest(alpha) < limit:
        return _conclude("refuted", "equality", widest, alpha)
    return _open(weakest, tail, weakest.mean - limit, tail if weakest.mean > limit else shared)


def within(contrasts: NDArray[float64], limit: float, *, alpha: float = 0.05, family: int = 1) -> Conclusion:
    """The statement that every contrast is at most `limit` (a log ratio) from zero, in either direction.

    supported: the (1 - 2 alpha) interval of each lies inside · refuted: the corrected interval of one, corrected for
    their number too, lies outside · else inconclusive. Raises ValueError as `beyond` does.
    """
    found = _checked(contrasts)
    widest = max(found, key=lambda one: one.furthest(alpha))
    if widest.furthest(alpha) < limit:
        return _conclude("supported", "equality", widest, alpha)
    shared = alpha / family / 2 / len(found)
    outside = max(found, key=lambda one: one.nearest(shared))
    if outside.nearest(shared) > limit + ROUNDING:
        return _conclude("refuted", "difference", outside, shared)
    short = limit - abs(widest.mean)
    return _open(widest, alpha, short, alpha if short > 0 else shared)


def opposite(conclusion: Conclusion) -> Conclusion:
    """The conclusion on the statement's negation."""
    swapped: dict[Support, Support] = {"supported": "refuted", "refuted": "supported", "inconclusive": "inconclusive"}
    return dataclasses.replace(conclusion, status=swapped[conclusion.status])


def _open(contrast: _Contrast, tail: float, distance: float, decisive: float) -> Conclusion:
    """An open statement: `distance` is from the contrast to the limit, `decisive` the tail of the interval that would
    clear it on the side on which it lies."""
    needed = replicates_to_clear(abs(distance), contrast.spread.sd, decisive) if distance else None
    return dataclasses.replace(_conclude("inconclusive", "", contrast, tail), replicates_needed=needed)


def _checked(contrasts: NDArray[float64]) -> list[_Contrast]:
    import numpy as np

    columns = np.asarray(contrasts, dtype=float)
    columns = columns[:, None] if columns.ndim == 1 else columns
    if columns.ndim != 2 or not columns.size or not np.isfinite(columns).all():
        raise ValueError(f"contrasts have shape {columns.shape}: pass finite numbers, replicates × contrasts")
    return [_contrast(index, column) for index, column in enumerate(columns.T)]


def _contrast(index: int, values: NDArray[float64]) -> _Contrast:
    effect = paired_effect(values, "replicate")
    if effect.spread is None:
        raise ValueError("one replicate has no scatter to judge by: measure 2 or more")
    return _Contrast(index=index, mean=effect.log_ratio, spread=effect.spread, replicates=effect.replicates)


def _conclude(status: Support, by: By, contrast: _Contrast, tail: float) -> Conclusion:
    return Conclusion(
        status=status,
        by=by,
        contrast=contrast.index,
        estimate=contrast.mean,
        low=contrast.low(_SHOWN_TAIL),
        high=contrast.high(_SHOWN_TAIL),
        decided_low=contrast.low(tail),
        decided_high=contrast.high(tail),
        level=1 - 2 * tail,
        replicates=contrast.replicates,
    )
