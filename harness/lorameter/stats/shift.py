"""Detects a change of the machine between two runs: all benchmarks then change by about the same factor.

Runs at different times are compared unpaired, so every ratio includes changes of the machine in between (another clock,
another driver, other work). Such a change has one direction for all benchmarks, while a change of the code affects only
some. The sign test (Dixon & Mood 1946) tests whether nearly all comparisons are beyond the tolerance on one side; the
median absolute deviation (Hampel 1974) tests whether one factor explains them.

Use it for unpaired comparisons only. A code change that slows down every variant alike looks exactly like a slower
machine: only pairs, which share the machine, can distinguish the two. In a paired run this test would hide the
regression, so do not use it there; after a positive result, measure both sides in one run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorameter.stats.effect import from_log
from lorameter.stats.intervals import sign_test
from lorameter.stats.samples import checked_number, checked_samples
from lorameter.stats.verdict import checked_alpha

if TYPE_CHECKING:
    from collections.abc import Mapping

# Converts a median absolute deviation to a standard deviation of normal values.
_MAD_TO_SD = 1.4826
# One factor explains the changes if the remaining scatter is less than half of the factor.
_LARGEST_SCATTER = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class RunWideShift:
    """Whether two runs differ by one common factor."""

    shifted: bool
    """True if the comparisons prove nothing about the code, so that the run is `invalid`."""
    ratio: float | None
    """Median of the ratios, candidate over base; None without comparisons."""
    comparisons: int
    reason: str
    """One sentence for users: the reason, with the numbers."""


def run_wide_shift(log_ratios: Mapping[str, float], *, tolerance: float = 0.01, alpha: float = 0.05) -> RunWideShift:
    """Whether nearly all of these unpaired comparisons shifted to one side by about the same factor.

    `log_ratios` maps a comparison's name to the log of candidate over base. A shift requires three conditions: the
    number of comparisons beyond the tolerance on one side has a probability of at most `alpha` (sign test, two-sided: 6
    of 6, 8 of 9, 9 of 10), the median is therefore also beyond it, and the scatter of the log ratios is at most half
    the median. A few regressed benchmarks, or many that changed by different amounts, are not a shift. Raises
    ValueError, naming the comparison, for log ratios that are not finite, and for limits out of range.
    """
    import numpy as np

    allowed = math.log1p(checked_number("tolerance", tolerance, at_least=0, strictly=False))
    checked_alpha(alpha)
    if not log_ratios:
        return RunWideShift(shifted=False, ratio=None, comparisons=0, reason="there is no comparison")
    for name, value in log_ratios.items():
        checked_samples(f"comparison {name!r}", [value], positive=False)
        if not from_log(value) or from_log(-value) is None:
            raise ValueError(
                f"comparison {name!r} has the log ratio {value:g}, more than a number holds: check the units"
            )
    values = np.array([float(value) for value in log_ratios.values()])
    median = float(np.median(values))
    scatter = _MAD_TO_SD * float(np.median(np.abs(values - median)))
    beyond = int((math.copysign(1.0, median) * values > allowed).sum())
    count = values.size
    chance = sign_test(beyond, count) if 2 * beyond > count else 1.0
    one_sided = chance <= alpha
    alike = scatter <= _LARGEST_SCATTER * abs(median)
    seen = (
        f"{beyond} of {count} comparisons lie beyond the tolerance of {100 * tolerance:.3g} % on one side "
        f"(sign test p = {chance:.2g}), median ratio {math.exp(median):.4g}, scatter {100 * scatter:.3g} %"
    )
    if one_sided and alike:
        reason = f"{seen}: the machine changed, not the code; measure both sides in one run"
    elif one_sided:
        reason = f"{seen}: each moved by its own amount, which is not one change of the machine"
    else:
        reason = f"{seen}: not a movement of all"
    return RunWideShift(shifted=one_sided and alike, ratio=math.exp(median), comparisons=count, reason=reason)
