"""Stores profiler events as columns: totals by name, the busy time of a device, and operators' self times.

A GPU runs several streams at once, so the sum of durations can exceed the elapsed time; the busy time is the length of
the *union* of the intervals of a device. An event that a tool wrote twice (as in merged files) counts once.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kernels_check.rules import KernelNameFacts, Rule, classify_operator

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Lane: TypeAlias = tuple[str, str]
"""Device and stream, or process and thread."""
Row: TypeAlias = tuple[str, Lane, float, float, int]
"""Name, lane, start and duration in microseconds, correlation with the launch on the host."""


@dataclass(frozen=True, slots=True)
class Events:
    """Columns of equal length, each event once."""

    names: list[str]
    lanes: list[Lane]
    name: Integers
    """Index into ``names``."""
    lane: Integers
    """Index into ``lanes``."""
    start_us: Floats
    """NaN for an event without a usable start and duration."""
    duration_us: Floats
    """NaN for the same events."""
    correlation: Integers
    repeated: int
    """Number of events that were left out because another event was the same in every column."""

    def __len__(self) -> int:
        return len(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class NameTotal:
    """All events of one name."""

    name: str
    calls: int
    time_ms: float
    rule: Rule | None = None
    """The rule that the name matches."""
    facts: KernelNameFacts = field(default_factory=KernelNameFacts)


def make_events(rows: Iterable[Row]) -> Events:
    """Columns of these events, in any order."""
    columns: tuple[array[Any], ...] = (array("q"), array("q"), array("d"), array("d"), array("q"))
    names: dict[str, int] = {}
    lanes: dict[Lane, int] = {}
    for name, lane, start_us, duration_us, correlation in rows:
        name_index, lane_index = names.setdefault(name, len(names)), lanes.setdefault(lane, len(lanes))
        row = (name_index, lane_index, start_us, duration_us, correlation)
        for column, value in zip(columns, row, strict=True):
            column.append(value)
    arrays: list[npt.NDArray[Any]] = [np.array(column) for column in columns]
    start, duration = arrays[2:4]
    untimed = ~(np.isfinite(start + duration) & (duration >= 0.0))
    start[untimed] = duration[untimed] = np.nan
    order = np.lexsort(arrays)
    arrays = [column[order] for column in arrays]
    # NaN equals nothing: two events without a time are distinct.
    same = np.logical_and.reduce([column[1:] == column[:-1] for column in arrays])
    is_first = np.concatenate(([True], ~same))[: len(order)]
    return Events(
        names=[*names],
        lanes=[*lanes],
        name=arrays[0][is_first],
        lane=arrays[1][is_first],
        start_us=arrays[2][is_first],
        duration_us=arrays[3][is_first],
        correlation=arrays[4][is_first],
        repeated=int(same.sum()),
    )


def sum_by_name(events: Events) -> list[NameTotal]:
    """Calls and time of each name; an event without a usable duration adds no time."""
    calls = np.bincount(events.name, minlength=len(events.names))
    time_us = np.bincount(events.name, weights=np.nan_to_num(events.duration_us), minlength=len(events.names))
    return [
        NameTotal(name=name, calls=int(calls[index]), time_ms=float(time_us[index]) / 1e3)
        for index, name in enumerate(events.names)
    ]


def busy_time_us(events: Events) -> dict[str, float]:
    """Microseconds in which anything ran, by device; empty if no event has a time."""
    timed = np.isfinite(events.start_us)
    busy = {}
    for device in dict.fromkeys(device for device, _ in events.lanes):
        lanes = [index for index, lane in enumerate(events.lanes) if lane[0] == device]
        chosen = timed & np.isin(events.lane, lanes)
        if chosen.any():
            busy[device] = union_length(events.start_us[chosen], events.duration_us[chosen])
    return busy


def union_length(start: Floats, duration: Floats) -> float:
    """Length of the union of intervals: each adds its part beyond all that began before it; 0 without intervals."""
    if not len(start):
        return 0.0
    order = np.argsort(start, kind="stable")
    start = start[order] - start.min()  # timestamps since 1970 would lose their last bits in a sum
    end = start + duration[order]
    reached = np.concatenate((start[:1], np.maximum.accumulate(end)[:-1]))
    return float(np.maximum(end - np.maximum(reached, start), 0.0).sum())


@dataclass(slots=True)
class _OpenOperator:
    end_us: float
    key: tuple[int, int]
    attention: int
    """Index of the enclosing attention operator, or of the operator itself; -1 outside attention."""


def operator_times(events: Events) -> list[NameTotal]:
    """Self time and calls of each CPU operator; operators inside attention have a separate entry.

    A call inside a call of the same name (the dispatcher records operators written in Python twice), or inside another
    attention operator, does not count separately.
    """
    rules = [classify_operator(name) for name in events.names]
    time_us: defaultdict[tuple[int, int], float] = defaultdict(float)
    calls: defaultdict[tuple[int, int], int] = defaultdict(int)
    order = np.lexsort((-events.duration_us, events.start_us, events.lane))
    order = order[np.isfinite(events.start_us[order])]
    columns = (events.name, events.lane, events.start_us, events.duration_us)
    lane_before, stack = -1, list[_OpenOperator]()
    for name, lane, start, duration in zip(*(column[order].tolist() for column in columns), strict=True):
        if lane != lane_before:
            lane_before, stack = lane, []
        while stack and stack[-1].end_us <= start:
            stack.pop()
        caller = stack[-1] if stack else None
        inside = caller.attention if caller is not None else -1
        rule = rules[name]
        attention = name if inside < 0 and rule is not None and rule.category == "attention" else inside
        key = (name, attention)
        time_us[key] += duration
        if caller is not None:
            time_us[caller.key] -= min(duration, caller.end_us - start)
        if inside < 0 and (caller is None or caller.key[0] != name):
            calls[key] += 1
        stack.append(_OpenOperator(start + duration, key, attention))
    return [
        NameTotal(
            name=events.names[name],
            rule=rules[attention if attention >= 0 else name],
            calls=calls[name, attention],
            time_ms=max(0.0, time) / 1e3,
        )
        for (name, attention), time in time_us.items()
    ]
