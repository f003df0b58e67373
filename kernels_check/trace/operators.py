"""Judges a trace without a GPU by the operators on the host.

There operators take the place of kernels, but they nest: the time of one is what it spends outside those it calls, and
whatever an attention operator calls belongs to attention. The names are the dispatcher's own, so the backend is as
certain as on a GPU; a share of time is that of the operators, without Python and idling.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from kernels_check.rules import Rule, classify_operator
from kernels_check.trace.kineto import Events
from kernels_check.trace.timeline import EventArrays

_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorTime:
    """One operator's own time, and the rule that it counts for."""

    name: str
    rule: Rule | None
    calls: int
    time_ms: float


@dataclass(slots=True)
class _OpenOperator:
    end_us: float
    key: tuple[int, int]
    attention: int
    """Index of the attention operator around it, itself included; -1 outside."""


def operator_times(events: Events, kept: EventArrays) -> list[OperatorTime]:
    """Own time and calls of each operator, those inside attention apart from the others.

    A call inside a call of the same name (the dispatcher records operators written in Python twice), or inside
    another attention operator, is no call of its own.
    """
    rules = [classify_operator(name) for name in events.names]
    is_attention = [rule is not None and rule.category == "attention" for rule in rules]
    time_us: defaultdict[tuple[int, int], float] = defaultdict(float)
    calls: defaultdict[tuple[int, int], int] = defaultdict(int)
    usable = np.isfinite(kept.start_us + kept.duration_us)
    order = np.lexsort((-kept.duration_us[usable], kept.start_us[usable], kept.lane[usable]))
    columns = [column[usable][order] for column in (kept.name, kept.lane)]
    times = [column[usable][order] for column in (kept.start_us, kept.duration_us)]
    lane_before, stack = -1, list[_OpenOperator]()
    for first in range(0, len(order), _CHUNK):  # lists of Python numbers take four times the memory of the columns
        part = slice(first, first + _CHUNK)
        names, lanes = (column[part].tolist() for column in columns)
        starts, durations = (column[part].tolist() for column in times)
        for name, lane, start, duration in zip(names, lanes, starts, durations, strict=True):
            if lane != lane_before:
                lane_before, stack = lane, []
            while stack and stack[-1].end_us <= start:
                stack.pop()
            caller = stack[-1] if stack else None
            inside = caller.attention if caller is not None else -1
            attention = inside if inside >= 0 else name if is_attention[name] else -1
            key = (name, attention)
            time_us[key] += duration
            if caller is not None:
                time_us[caller.key] -= min(duration, caller.end_us - start)
            if inside < 0 and (caller is None or caller.key[0] != name):
                calls[key] += 1
            stack.append(_OpenOperator(start + duration, key, attention))
    return [
        OperatorTime(
            name=events.names[name],
            rule=rules[attention if attention >= 0 else name],
            calls=calls[name, attention],
            time_ms=max(0.0, time) / 1e3,
        )
        for (name, attention), time in time_us.items()
    ]
