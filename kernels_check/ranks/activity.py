"""How a rank spends a step: computing, exchanging, or waiting for the others, by one profiled step.

Ranks wait for each other inside their exchanges, so the times of their steps are alike whichever is slow. What
distinguishes them is the time outside of exchanges: it is a rank's own. An exchange that goes on while the rank
computes costs it nothing, so only what is exposed is taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

EXCHANGES = ("gloo:", "nccl:", "ncclDevKernel", "ncclKernel", "mpi:", "ucc:", "xccl:")
"""How what exchanges is called: the ranges of torch's process groups, and NCCL's kernels."""
OPERATORS = "aten::"
_STEP = "kernels_check.ranks step"


STEPS = 3
"""Profiled steps: whatever else the machine does adds to a rank's time in one of them, and seldom in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTime:
    """The time of some steps on one rank, in seconds a step."""

    step_s: float
    exchange_s: float
    """While anything was exchanged or waited for."""
    exposed_s: float
    """The part of it in which nothing was computed."""
    own_s: float
    """What the rank takes if it waits for no other: the least of the steps."""


Interval = tuple[float, float]


def share_of(step: Callable[[], object], meet: Callable[[], object]) -> RankTime | None:
    """Take some steps under the profiler and say how they were spent; None where CUDA is in use and no kernel was
    recorded, as can happen on the heels of another session. It is not tried again, which all ranks would have to agree
    on: one without its times leaves the others' without a meaning.

    Args:
        step: one step, together with all other ranks.
        meet: waits until every rank is there, before each step: no profiler that starts later is waited for in it.
    """
    activities = [ProfilerActivity.CPU]
    on_device = torch.cuda.is_available() and torch.cuda.is_initialized()
    if on_device:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded:
        for _ in range(STEPS):
            meet()
            with record_function(_STEP):
                step()
                if on_device:
                    torch.cuda.synchronize()
    return share_in(recorded.events(), on_device=on_device)


def share_in(events: Sequence[Any], *, on_device: bool) -> RankTime | None:
    """What the profiler's events say of the steps in them, `on_device` by the kernels of a GPU, else by the operators
    of the thread that takes them; None without any of the GPU. What is marked there, as a step is, is no work."""
    exchanged, computed, steps, thread = [], [], [], 0
    for event in events:
        if event.name == _STEP and "CUDA" not in str(event.device_type):
            steps.append(_interval(event))
            thread = event.thread
    for event in events:
        on_card = "CUDA" in str(event.device_type)
        if event.name.startswith(EXCHANGES):
            exchanged.append(_interval(event))
        elif on_device and on_card and not event.is_user_annotation:
            computed.append(_interval(event))
        elif not on_device and event.thread == thread and event.name.startswith(OPERATORS):
            computed.append(_interval(event))  # gloo's own threads call operators as well
    if on_device and not any("CUDA" in str(event.device_type) for event in events):
        return None
    exchanges, busy = united(exchanged), united(computed)
    found = []
    for whole in steps:
        inside = common(exchanges, [whole])
        found.append((length_of([whole]), length_of(inside), length_of(inside) - length_of(common(inside, busy))))
    return RankTime(
        step_s=sum(step_s for step_s, _, _ in found) / len(found),
        exchange_s=sum(exchange_s for _, exchange_s, _ in found) / len(found),
        exposed_s=sum(exposed_s for _, _, exposed_s in found) / len(found),
        own_s=min(step_s - exposed_s for step_s, _, exposed_s in found),
    )


def _interval(event: Any) -> Interval:
    return event.time_range.start * 1e-6, event.time_range.end * 1e-6


def united(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time as intervals that are apart, in their order."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def common(some: list[Interval], others: list[Interval]) -> list[Interval]:
    """What two lists of intervals that are apart and in order have in common."""
    found, first, second = [], 0, 0
    while first < len(some) and second < len(others):
        begin, end = max(some[first][0], others[second][0]), min(some[first][1], others[second][1])
        if begin < end:
            found.append((begin, end))
        if some[first][1] < others[second][1]:
            first += 1
        else:
            second += 1
    return found


def length_of(intervals: Iterable[Interval]) -> float:
    """The sum of their lengths."""
    return sum(end - begin for begin, end in intervals)
