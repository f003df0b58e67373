"""Compares memory peaks by their maximum, with a tolerance and without a test.

A peak is a discrete number: an allocator takes one of a few paths, and often always the same one. A t-test on it either
divides by a variance of zero or treats two modes as noise (executorch observed 4 values in 22 runs, in a band of 160
MB). A user needs to know whether the program still fits, which depends on the largest observed peak.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorameter.stats.samples import checked_number, checked_samples
from lorameter.stats.verdict import Comparison, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence


def compare_bytes(base: Sequence[float], candidate: Sequence[float], *, tolerance: float) -> Comparison:
    """The verdict on two lists of peaks in bytes, one per trial: the maxima are equal if they agree within `tolerance`.

    `tolerance` is a fraction; use 0 for computed bytes, which must agree exactly. The interval is the ratio itself;
    there is no power and no number of replicates to plan. Lists may differ in length. Raises ValueError for an empty
    list, for peaks that are negative or not finite, and for a tolerance below 0.
    """
    tolerance = checked_number("tolerance", tolerance, at_least=0, strictly=False)
    peak_base, peak_candidate = _peak("base", base), _peak("candidate", candidate)
    verdict: Verdict = "equivalent"
    if peak_candidate > peak_base * (1 + tolerance):
        verdict = "regressed"
    elif peak_base > peak_candidate * (1 + tolerance):
        verdict = "improved"
    ratio = peak_candidate / peak_base if peak_base > 0 else (1.0 if peak_candidate == 0 else None)
    beyond = f"more than {100 * tolerance:.3g} % " if tolerance else ""
    where = {
        "regressed": f"{beyond}above",
        "improved": f"{beyond}below",
        "equivalent": "equal to" if peak_base == peak_candidate else f"within {100 * tolerance:.3g} % of",
    }[verdict]
    return Comparison(
        verdict=verdict,
        ratio=ratio,
        low=ratio,
        high=ratio,
        reason=(
            f"the largest peak of {len(candidate)} candidate trials, {peak_candidate:.0f} bytes, is {where} "
            f"the {peak_base:.0f} bytes of {len(base)} base trials"
        ),
        replicates=min(len(base), len(candidate)),
        replicates_needed=None,
        mde80=None,
    )


def _peak(side: str, peaks: Sequence[float]) -> float:
    values = checked_samples(side, peaks, positive=False)
    if values.min() < 0:
        index = int(values.argmin())
        raise ValueError(
            f"{side} sample {index} is {values[index]:g} bytes: a peak cannot be negative; measure it again"
        )
    return float(values.max())
