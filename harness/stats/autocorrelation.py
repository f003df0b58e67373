"""How many independent samples a series of step times is worth.

Steps come in bursts: on a noisy machine 31 % of the processes had a lag-1 autocorrelation above 0.26, and one in ten
had no more than 13 independent steps among its 60. What is said of a tail from such a series must count those. The sum
of the autocorrelations is cut off by Geyer's initial monotone sequence ("Practical Markov chain Monte Carlo", 1992,
section 3.3): sums of neighbouring lags, while they are positive and not above the one before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.stats.samples import checked_samples

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy import float64
    from numpy.typing import NDArray

# Deviations below this part of the values are rounding, and their correlation says nothing.
_ROUNDING = 1e-12


def effective_size(samples: Sequence[float]) -> float:
    """The number of independent samples with the same error of the mean, between 1 and the number of samples.

    Series of one value throughout, and of fewer than 4 samples, from which no correlation can be told, count in full;
    so do series that alternate, whose mean is better than that of independent samples: no bonus is given.
    Raises ValueError for no samples and for samples that are not finite.
    """
    import numpy as np

    values = checked_samples("samples", samples, positive=False)
    largest = float(np.abs(values).max())
    deviations = values / largest if largest > 0 else values  # so that no square overflows
    deviations = deviations - deviations.mean()
    if values.size < 4 or np.abs(deviations).max() <= _ROUNDING:
        return float(values.size)
    correlations = _autocorrelations(deviations)
    pairs = correlations[: correlations.size // 2 * 2].reshape(-1, 2).sum(axis=1)
    ended = pairs <= 0
    first_end = int(ended.argmax()) if ended.any() else pairs.size
    pairs = np.minimum.accumulate(pairs[:first_end])
    steps_per_sample = 2 * float(pairs.sum()) - 1
    return values.size / min(max(steps_per_sample, 1.0), float(values.size))


def _autocorrelations(deviations: NDArray[float64]) -> NDArray[float64]:
    """At lags 0 to n - 1, each divided by n: the biased estimate, which decays; O(n log n)."""
    import numpy as np
    from scipy import fft

    count = deviations.size
    spectrum = fft.rfft(deviations, fft.next_fast_len(2 * count, real=True))
    products = fft.irfft(np.abs(spectrum) ** 2, fft.next_fast_len(2 * count, real=True))[:count]
    return np.asarray(products / products[0])
