"""Counts outliers, which are reported but never dropped.

A slow step is a fact about the machine or the program; removing it by its value would underestimate the noise, and
medians do not need the removal. The fences are Tukey's (1977), 1.5 interquartile ranges from the quartiles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorameter.stats.samples import checked_samples

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy import float64
    from numpy.typing import NDArray


_FENCE_IQR = 1.5


def count_outliers(trials: Sequence[Sequence[float]]) -> int:
    """The number of samples that are outliers of their own trial: beyond 1.5 interquartile ranges from its quartiles.

    Trials of the same length are processed together: numpy's quantiles take as long for one trial as for hundreds.
    Raises ValueError for NaN or infinite samples.
    """
    import numpy as np

    by_length: dict[int, list[NDArray[float64]]] = {}
    for samples in trials:
        if len(samples):
            by_length.setdefault(len(samples), []).append(checked_samples("samples", samples, positive=False))
    together = (_beyond_quartiles(np.stack(rows)) for rows in by_length.values())
    return sum(int(np.count_nonzero(distance > _FENCE_IQR * spread)) for distance, spread in together)


def _beyond_quartiles(values: NDArray[float64]) -> tuple[NDArray[float64], NDArray[float64]]:
    """For values along the last axis: their distance outside the quartiles, and the interquartile range."""
    import numpy as np

    first_quartile, third_quartile = np.quantile(values, [0.25, 0.75], axis=-1, keepdims=True)
    return np.maximum(first_quartile - values, values - third_quartile), third_quartile - first_quartile
