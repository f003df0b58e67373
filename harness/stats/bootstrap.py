"""The interval of a quantity that several medians of the same turns make up, by resampling the turns.

Order statistics give the interval of one median, and none of a difference of medians whose samples belong together.
The percentile bootstrap does (Efron 1979), if the samples are enough: it under-covers where a mean has 3 to 12 of them,
which is why comparisons between replicates do not use it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

RESAMPLES = 2000


def bootstrap_interval(
    columns: Sequence[Sequence[float]], statistic: Callable[..., Any], *, alpha: float = 0.05
) -> tuple[float | None, float | None]:
    """Both ends of the two-sided (1 - alpha) interval of `statistic(*columns)`; None where fewer than 6 rows are there.

    Args:
        columns: as long as each other; values at the same place belong together and are resampled together.
        statistic: of arrays, along their `axis`, which it takes as a keyword.
        alpha: error rate.

    Raises ValueError for columns of different lengths.
    """
    from scipy.stats import bootstrap

    if len({len(column) for column in columns}) != 1:
        raise ValueError(f"columns of {[len(column) for column in columns]} values: pass as many in each")
    if len(columns[0]) < 6:
        return None, None
    found = bootstrap(
        tuple(columns), statistic, paired=True, vectorized=True, method="percentile", n_resamples=RESAMPLES,
        confidence_level=1 - alpha, rng=0,
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)
