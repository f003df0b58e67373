"""How much of the scatter of one quantity another accounts for: the squared correlation, over replicates.

Within a replicate R² is the share of the variance of y that a straight line in x takes away. One value a replicate, and
Student's t over replicates gives the interval, clipped to [0, 1], which a share cannot leave.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.stats.intervals import quantile

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

LEAST_POINTS = 3
"""Any line goes through two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A share with its 95 % interval over replicates."""

    value: float
    low: float | None
    """None with one replicate."""
    high: float | None
    replicates: int
    points: int
    """Points (x, y) of all replicates together."""


def explained_share(blocks: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Share | None:
    """R² of y on x, from one (x, y) a replicate; None where none can say.

    A replicate says nothing with fewer than three points, or where x or y is the same at all of them.
    Raises ValueError for x and y of unequal length.
    """
    import numpy as np

    pairs = [(np.asarray(x, dtype=float), np.asarray(y, dtype=float)) for x, y in blocks]
    telling = [(x, y) for x, y in pairs if _tells(x, y)]
    if not telling:
        return None
    shares = np.array([np.corrcoef(x, y)[0, 1] ** 2 for x, y in telling])
    mean = float(shares.mean())
    half = None
    if shares.size > 1:
        half = quantile(shares.size - 1, 0.025) * float(shares.std(ddof=1)) / math.sqrt(shares.size)
    return Share(
        value=mean,
        low=None if half is None else max(0.0, mean - half),
        high=None if half is None else min(1.0, mean + half),
        replicates=shares.size,
        points=sum(x.size for x, _ in telling),
    )


def _tells(x: NDArray[float64], y: NDArray[float64]) -> bool:
    if x.size != y.size:
        raise ValueError(f"x has {x.size} points and y {y.size}: pass one pair a point")
    return bool(x.size >= LEAST_POINTS and x.max() > x.min() and y.max() > y.min())
