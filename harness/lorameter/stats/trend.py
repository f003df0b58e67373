"""Contrasts over the ordered levels of an axis: one number per replicate for the statement of a claim.

Replicates are blocks: each contains every level, so common effects (the seed, the state of the machine) cancel in a
contrast, whose weights sum to zero. Contrasts are computed within each replicate before the scatter over replicates, so
no assumption is made about the correlation or the equality of the levels' noise. The inputs are logs, so a contrast is
the log of a ratio.

The share of the scatter of one quantity that another explains is the squared correlation within a replicate: the share
of the variance of y that a straight line in x explains. Its interval is Student's t over replicates, clipped to [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lorameter.stats.intervals import quantile

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray


Scale = Literal["log", "linear"]


def scores(levels: Sequence[float], scale: Scale) -> tuple[float, ...]:
    """The positions of the levels: their values, or the base-2 logarithms of the values.

    Raises ValueError for fewer than two levels, for equal levels, and for a logarithm of a level that is not above
    zero.
    """
    if len(set(levels)) < max(2, len(levels)):
        raise ValueError(f"levels are {list(levels)}: pass two or more, each once")
    if scale == "linear":
        return tuple(levels)
    if min(levels) <= 0:
        raise ValueError(f"levels are {list(levels)}: {min(levels):g} has no logarithm; take the linear scale")
    return tuple(math.log2(level) for level in levels)


def line_change(logs: NDArray[float64], positions: Sequence[float]) -> NDArray[float64]:
    """The change of the least-squares line through each replicate's levels, from the first level to the last.

    `logs` is replicates × levels, `positions` the result of `scores`. With two levels it is their difference. A line
    uses every level, so a rising value can be distinguished from one that scatters; a curvature is not detected.
    """
    import numpy as np

    centred = np.asarray(positions) - np.mean(positions)
    weights = centred / (centred @ centred) * (positions[-1] - positions[0])
    return np.asarray(logs @ weights)


def sizes(changes: NDArray[float64]) -> NDArray[float64]:
    """Magnitudes of changes: each replicate's change in the direction of the mean change.

    Absolute values would turn the scatter around a zero change into a magnitude.
    """
    import numpy as np

    return np.asarray(changes * np.sign(changes.mean()))


LEAST_POINTS = 3
"""Every line fits two points."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareEstimate:
    """A share with its 95 % interval over replicates."""

    value: float
    low: float | None
    """Lower end; None with one replicate."""
    high: float | None
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
    informative = [(x, y) for x, y in pairs if _is_informative(x, y)]
    if not informative:
        return None
    shares = np.array([np.corrcoef(x, y)[0, 1] ** 2 for x, y in informative])
    mean = float(shares.mean())
    half = None
    if shares.size > 1:
        half = quantile(shares.size - 1, 0.025) * float(shares.std(ddof=1)) / math.sqrt(shares.size)
    return ShareEstimate(
        value=mean,
        low=None if half is None else max(0.0, mean - half),
        high=None if half is None else min(1.0, mean + half),
        replicates=shares.size,
        points=sum(x.size for x, _ in informative),
    )


def _is_informative(x: NDArray[float64], y: NDArray[float64]) -> bool:
    if x.size != y.size:
        raise ValueError(f"x has {x.size} points and y {y.size}: pass one pair a point")
    return bool(x.size >= LEAST_POINTS and x.max() > x.min() and y.max() > y.min())
