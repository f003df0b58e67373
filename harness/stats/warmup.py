"""Where warm-up ends: compiled kernels, filled caches, a settled clock.

After the fact, `warmup_end` looks for change points in the log step times and classifies the series as Barrett et al.
(2017, "Virtual machine warmup blows hot and cold") do. A fixed number of discarded steps is either too short for a
compiled model or wasteful for an eager one. While the steps run, `is_steady` is the cheap question whether to go on
warming up.

The change points come from binary segmentation (Scott & Knott 1974) on shifts of the mean, with a penalty of three log
n a change, as a BIC-type criterion asks (Yao 1988, made stricter, because step times are not quite independent). The
unit of cost is the noise between neighbours, so a slow drift or a step cannot hide itself by inflating the variance.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from harness.stats.samples import checked_number, checked_samples

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy import float64
    from numpy.typing import NDArray

WarmupKind = Literal["flat", "warmup", "slowdown", "no_steady_state"]

_PENALTY_PER_LOG_N = 3.0
# Steps are not told apart below a thousandth: clocks that tick coarsely make most differences exactly zero.
_NOISE_FLOOR = 1e-3
# From the median absolute difference of neighbours to their standard deviation, if normal: 1.4826, and two steps
# differ.
_MAD_TO_SD = 1.4826 / math.sqrt(2)
# Barrett et al. ask the last quarter of a series to be steady; and what follows warm-up must be mostly at one level.
_LEAST_STEADY_SHARE = 0.25
_LEAST_SHARE_AT_LEVEL = 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupResult:
    """How many leading steps precede the steady state, and what they look like."""

    steps: int
    """Leading steps to discard: 0 if flat, all of them if there is no steady state."""
    kind: WarmupKind
    """flat: steady at once · warmup: slower first · slowdown: faster first (throttling, a leak) · no_steady_state."""


def warmup_end(samples: Sequence[float], *, min_segment: int = 3, tolerance: float = 0.02) -> WarmupResult:
    """Where the steady state of a series of step times begins.

    The level of the last segment is the steady one. Leading segments whose level differs by more than `tolerance` (a
    fraction) and by more than the noise are what is discarded; a passing burst later on is not warm-up. There is no
    steady state if it covers less than a quarter of the steps, if more than a quarter of the steps after its start are
    at another level, or if there are fewer than 2 * `min_segment` steps, from which none can be shown. `steps` is the
    whole length then: the caller warms up longer or says so. A single first step (compilation) is found; a single slow
    step later on is taken for a hiccup. On flat noise it finds something else than `flat` in about one series of 25.

    Raises ValueError for no samples, for samples not finite and above zero, for min_segment < 2 and tolerance < 0.
    """
    import numpy as np

    if min_segment < 2:
        raise ValueError(f"min_segment is {min_segment}: a level needs at least 2 steps")
    allowed = math.log1p(checked_number("tolerance", tolerance, at_least=0, strictly=False))
    log_times = np.log(checked_samples("samples", samples, positive=True))
    count = log_times.size
    nothing_steady = WarmupResult(steps=count, kind="no_steady_state")
    if count < 2 * min_segment:
        return nothing_steady

    noise = max(float(np.median(np.abs(np.diff(log_times)))) * _MAD_TO_SD, _NOISE_FLOOR)
    despiked = _without_hiccups(log_times)
    penalty = _PENALTY_PER_LOG_N * math.log(count)
    starts = _segment_starts(despiked / noise, min_segment, penalty)
    ends = [*starts[1:], count]
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    levels = [float(despiked[start:end].mean()) for start, end in zip(starts, ends, strict=True)]
    # Segments that do not touch are told apart by the criterion that parts neighbours, and only beyond the tolerance.
    at_level = [
        abs(level - levels[-1]) <= max(allowed, noise * math.sqrt(penalty * (1 / length + 1 / lengths[-1])))
        for level, length in zip(levels, lengths, strict=True)
    ]
    first_steady = at_level.index(True)
    steps = starts[first_steady]
    steady = sum(length for length, same in zip(lengths, at_level, strict=True) if same)
    if steady < _LEAST_STEADY_SHARE * count or steady < _LEAST_SHARE_AT_LEVEL * (count - steps):
        return nothing_steady
    if first_steady == 0:
        return WarmupResult(steps=0, kind="flat")
    faster_first = any(level < levels[-1] for level in levels[:first_steady])
    return WarmupResult(steps=steps, kind="slowdown" if faster_first else "warmup")


def is_steady(samples: Sequence[float], window: int, *, tolerance: float = 0.02) -> bool:
    """Whether to stop warming up: the last `window` steps are no longer faster than the `window` before them.

    True when the median log time of the last `window` steps is at most `tolerance` (a fraction) below that of the
    preceding window; False while there are fewer than two windows. Getting slower is no reason to go on. Medians let a
    single slow step pass. Costs O(window), so it may be asked after each step. No allowance is made for noise: it
    delays the answer by a few steps, and lets a decay pass that is smaller than the noise of a window's median.

    Raises ValueError for window < 2, and for samples in the two windows that are not finite and above zero.
    """
    if window < 2:
        raise ValueError(f"window is {window}: a trend needs at least 2 steps a window")
    allowed = math.log1p(checked_number("tolerance", tolerance, at_least=0, strictly=False))
    if len(samples) < 2 * window:
        return False
    recent = samples[-2 * window :]
    for index, sample in enumerate(recent, len(samples) - 2 * window):
        checked_number(f"samples sample {index}", sample, at_least=0, strictly=True)
    before = statistics.median(math.log(sample) for sample in recent[:window])
    after = statistics.median(math.log(sample) for sample in recent[window:])
    return before - after <= allowed


def _without_hiccups(log_times: NDArray[float64]) -> NDArray[float64]:
    """A running median of three: lone slow steps go, shifts keep their place, the first step (compilation) stays."""
    import numpy as np

    despiked = log_times.copy()
    triples = np.lib.stride_tricks.sliding_window_view(log_times, 3)
    despiked[1:-1] = np.median(triples, axis=1)
    despiked[-1] = despiked[-2]
    return despiked


def _segment_starts(values: NDArray[float64], min_segment: int, penalty: float) -> list[int]:
    """Starts of the segments of constant mean, in order and with the first 0; `values` in units of the noise."""
    starts = [0]
    pending = [(0, values.size)]
    while pending:
        start, end = pending.pop()
        split = _best_split(values[start:end], min_segment, penalty)
        if split is not None:
            starts.append(start + split)
            pending += [(start, start + split), (start + split, end)]
    return sorted(starts)


def _best_split(values: NDArray[float64], min_segment: int, penalty: float) -> int | None:
    """Where a change of the mean saves most squared error, or None if it saves no more than `penalty`."""
    import numpy as np

    if values.size < 2 * min_segment:
        return None
    sums = np.cumsum(values - values.mean())
    splits = np.arange(min_segment, values.size - min_segment + 1)
    # With the total at zero, the gain of a split after k of n is S_k^2 n / (k (n - k)).
    gains = sums[splits - 1] ** 2 * values.size / (splits * (values.size - splits))
    best = int(gains.argmax())
    return int(splits[best]) if gains[best] > penalty else None
