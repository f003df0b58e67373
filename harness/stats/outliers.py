"""Outliers are counted and shown, never dropped.

A slow step is a fact about the machine or the program; deleting it by its value makes the noise look smaller than it
is. Medians do not need the deletion. The labels are Tukey's (1977): `mild` beyond 1.5 interquartile ranges from the
quartiles, `severe` beyond 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

from harness.stats.samples import checked_samples

if TYPE_CHECKING:
    from collections.abc import Sequence

OutlierLabel = Literal["none", "mild", "severe"]

_MILD_IQR = 1.5
_SEVERE_IQR = 3.0


def label_outliers(samples: Sequence[float]) -> tuple[OutlierLabel, ...]:
    """One label a sample, in order; () of none. Values on a fence are inside it.

    Where more than half of the samples are one value the range between the quartiles is zero, and every other value is
    `severe`. Raises ValueError for NaN or infinite samples.
    """
    import numpy as np

    if len(samples) == 0:
        return ()
    values = checked_samples("samples", samples, positive=False)
    first_quartile, third_quartile = np.quantile(values, [0.25, 0.75])
    distance = np.maximum(first_quartile - values, values - third_quartile)
    spread = third_quartile - first_quartile
    labels = np.select([distance > _SEVERE_IQR * spread, distance > _MILD_IQR * spread], ["severe", "mild"], "none")
    return cast("tuple[OutlierLabel, ...]", tuple(labels.tolist()))
