"""Sums, busy share and kernels a step, from columns of events.

A GPU runs several streams at once, so the sum of durations can exceed the time that passed; the busy share is the
length of the *union* of the intervals of a device. An event that a tool wrote twice (merged files do that) counts once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernels_check.trace.kineto import NO_CORRELATION, Events, Kineto
from kernels_check.trace.nsys import KernelTotal

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCounts:
    """Kernels launched in each marked step."""

    steps: int
    lowest: int
    median: float
    highest: int


@dataclass(frozen=True, slots=True)
class EventArrays:
    """Events as arrays, each kept once."""

    name: Integers
    lane: Integers
    start_us: Floats
    duration_us: Floats
    """NaN where unknown."""
    correlation: Integers
    duplicates: int
    """How many were dropped because another was the same in every column."""


def columns(events: Events) -> EventArrays:
    """Drop repetitions; the order of the events in the file does not matter afterwards."""
    name, lane = _integers(events.name), _integers(events.lane)
    start, duration = np.array(events.start_us, dtype=np.float64), np.array(events.duration_us, dtype=np.float64)
    correlation = _integers(events.correlation)
    order = np.lexsort((correlation, name, lane, np.nan_to_num(duration, nan=-1.0), np.nan_to_num(start, nan=-np.inf)))
    name, lane, correlation = name[order], lane[order], correlation[order]
    start, duration = start[order], duration[order]
    same = np.ones(len(name), dtype=bool)
    same[:1] = False
    for key in (name, lane, start, duration, correlation):
        same[1:] &= key[1:] == key[:-1]  # NaN equals nothing: without a time two events are two
    kept = ~same
    return EventArrays(name[kept], lane[kept], start[kept], duration[kept], correlation[kept], int(same.sum()))


def totals(events: Events, kept: EventArrays) -> list[KernelTotal]:
    """Launches and summed time of each name; a launch without a usable duration counts with no time."""
    calls = np.bincount(kept.name, minlength=len(events.names))
    time_us = np.bincount(kept.name, weights=np.nan_to_num(kept.duration_us), minlength=len(events.names))
    return [
        KernelTotal(name=name, calls=int(calls[index]), time_ms=float(time_us[index]) / 1e3)
        for index, name in enumerate(events.names)
    ]


def busy_share(events: Events, kept: EventArrays) -> float | None:
    """Share of the time from the first start to the last end in which something ran, averaged over the devices.

    All devices are held against the same window, so one that finishes early is idle from then on. None where no event
    has a time.
    """
    timed = np.isfinite(kept.start_us + kept.duration_us)
    if not timed.any():
        return None
    start = kept.start_us[timed]
    start = start - start.min()  # in place of times since 1970, whose last bits a sum would lose
    end = start + kept.duration_us[timed]
    window = float(end.max())
    if window <= 0.0:
        return None
    device_of_lane: dict[str, int] = {}
    device = np.array([device_of_lane.setdefault(device, len(device_of_lane)) for device, _ in events.lanes])
    device = device[kept.lane[timed]]
    present = np.unique(device)
    busy = sum(_union(start[device == one], end[device == one]) for one in present)
    return min(1.0, busy / (window * len(present)))


def _union(start: Floats, end: Floats) -> float:
    """Length of the union of intervals: each adds what lies beyond everything that began before it."""
    order = np.argsort(start, kind="stable")
    start, end = start[order], end[order]
    reached = np.maximum.accumulate(end)
    before = np.concatenate((start[:1], reached[:-1]))
    return float(np.maximum(reached - np.maximum(before, start), 0.0).sum())


def step_counts(trace: Kineto, kept: EventArrays) -> StepCounts | None:
    """Count the kernels of each ProfilerStep; None where no step is marked.

    A kernel belongs to the step that launched it, which its correlation with the host's launch tells. Only where that
    is missing does it belong to the step in which it ran.
    """
    kernels = np.array([not name.startswith(("Memcpy", "Memset")) for name in trace.gpu.names], dtype=bool)
    chosen = kernels[kept.name] & np.isfinite(kept.start_us) if len(kernels) else np.zeros(0, dtype=bool)
    launched = _launch_times(trace, kept.correlation[chosen])
    known = np.isfinite(launched)
    on_gpu = trace.gpu_steps or trace.host_steps
    on_host = trace.host_steps
    if not on_gpu:
        return None
    counts: dict[int, int] = dict.fromkeys(on_host or on_gpu, 0)
    if not on_host:
        known[:] = False
    _count(counts, on_host, launched[known])
    _count(counts, on_gpu, kept.start_us[chosen][~known])
    values = np.array(list(counts.values()))
    return StepCounts(
        steps=len(values), lowest=int(values.min()), median=float(np.median(values)), highest=int(values.max())
    )


def _launch_times(trace: Kineto, correlation: Integers) -> Floats:
    known = _integers(trace.launch_correlation)
    found = np.full(len(correlation), np.nan)
    if len(known) == 0:
        return found
    order = np.argsort(known, kind="stable")
    known, when = known[order], np.array(trace.launch_us, dtype=np.float64)[order]
    position = np.minimum(np.searchsorted(known, correlation), len(known) - 1)
    hit = (known[position] == correlation) & (correlation != NO_CORRELATION)
    found[hit] = when[position[hit]]
    return found


def _count(counts: dict[int, int], steps: Mapping[int, tuple[float, float]], when: Floats) -> None:
    for step, (start, end) in steps.items():
        counts[step] = counts.get(step, 0) + int(((when >= start) & (when < end)).sum())


def _integers(values: object) -> Integers:
    return np.array(values, dtype=np.int64)
