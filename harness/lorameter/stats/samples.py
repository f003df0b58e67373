"""Validates samples, with precise error messages.

A comparison that ignores invalid input turns it into a verdict: pyperf prints "Significant" for any exception inside
its t-test (observed with two identical constant memory series). Here invalid input never reaches the arithmetic. Every
error names the side, the trial, the sample, the value and the remedy.

`count_outliers` counts outliers, which are reported but never dropped.

A slow step is a fact about the machine or the program; removing it by its value would underestimate the noise, and
medians do not need the removal. The fences are Tukey's (1977), 1.5 interquartile ranges from the quartiles.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[float64]"
"""An array of floats. A name for annotations, which does not load numpy."""


def checked_trials(side: str, trials: Sequence[Sequence[float]], *, positive: bool) -> list[Array]:
    """One float array per trial, in order.

    `side` is the argument's name in messages; `positive` also refuses zero and negative values. Raises ValueError
    without trials, and in the cases of `checked_samples`.
    """
    if len(trials) == 0:
        raise ValueError(f"{side} has no trial: measure it first, or report it as missing instead of comparing it")
    if (values := _single_values(trials, positive=positive)) is not None:
        return values
    return [checked_samples(f"{side} trial {index}", trial, positive=positive) for index, trial in enumerate(trials)]


def checked_samples(where: str, samples: Sequence[float], *, positive: bool) -> Array:
    """A flat float array of finite samples, at least one.

    Raises ValueError, naming `where`, for an empty or nested list and, with the sample's index and value, for NaN,
    infinity and, if `positive`, zero and negative values.
    """
    import numpy as np

    values = np.array(samples, dtype=float)
    if values.ndim != 1:
        raise ValueError(f"{where} is {reprlib.repr(samples)}: pass one flat list of numbers a trial")
    if values.size == 0:
        raise ValueError(f"{where} has no samples: leave a trial that measured nothing out, with its partner if paired")
    refused = ~np.isfinite(values)
    if positive:
        refused |= values <= 0
    if refused.any():
        index = int(refused.argmax())
        wanted = "finite and above zero" if positive else "finite"
        raise ValueError(
            f"{where} sample {index} is {values[index]!s}: samples must be {wanted}; "
            "mark that trial invalid and leave it out, with its partner if paired"
        )
    return values


def _single_values(trials: Sequence[Sequence[float]], *, positive: bool) -> list[Array] | None:
    """Convert trials with one valid sample each, such as memory peaks, all at once in a tenth of the time; else
    None."""
    import numpy as np

    if not all(type(trial) in (list, tuple) and len(trial) == 1 and type(trial[0]) is float for trial in trials):
        return None
    values = np.array([trial[0] for trial in trials])
    if not np.isfinite(values).all() or (positive and (values <= 0).any()):
        return None
    return list(values.reshape(-1, 1))


def trial_medians(trials: Sequence[Array]) -> Array:
    """One median per trial, for at least one trial; trials of the same length are processed at once in a tenth of the
    time."""
    import numpy as np

    if len({trial.size for trial in trials}) == 1:
        return np.asarray(np.median(np.stack(trials), axis=1))
    return np.array([np.median(trial) for trial in trials])


_FENCE_IQR = 1.5


def count_outliers(trials: Sequence[Sequence[float]]) -> int:
    """The number of samples that are outliers of their own trial: beyond 1.5 interquartile ranges from its quartiles.

    Trials of the same length are processed together: numpy's quantiles take as long for one trial as for hundreds.
    Raises ValueError for NaN or infinite samples.
    """
    import numpy as np

    by_length: dict[int, list[Array]] = {}
    for samples in trials:
        if len(samples):
            by_length.setdefault(len(samples), []).append(checked_samples("samples", samples, positive=False))
    together = (_beyond_quartiles(np.stack(rows)) for rows in by_length.values())
    return sum(int(np.count_nonzero(distance > _FENCE_IQR * spread)) for distance, spread in together)


def _beyond_quartiles(values: Array) -> tuple[Array, Array]:
    """For values along the last axis: their distance outside the quartiles, and the interquartile range."""
    import numpy as np

    first_quartile, third_quartile = np.quantile(values, [0.25, 0.75], axis=-1, keepdims=True)
    return np.maximum(first_quartile - values, values - third_quartile), third_quartile - first_quartile
