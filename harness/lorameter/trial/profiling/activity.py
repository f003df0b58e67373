"""What ran in each phase of a profiled step, from the profiler's own records.

Phases are marked on the host. On a GPU the device is synchronised at every border, so that a kernel runs inside the
window of the phase that launched it; on a CPU operators nest, and the time of one is what it spends outside those that
it calls. Which category a name belongs to is kernels_check's to say.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, Literal

from torch._C._autograd import DeviceType

from kernels_check.rules import Rule, classify
from kernels_check.trace.kineto import Events
from kernels_check.trace.operators import operator_times
from kernels_check.trace.timeline import EventArrays, busy_share, columns, totals
from lorameter.records.activity import (
    DROPOUT,
    DROPOUT_OPERATOR,
    STEP_PHASES,
    WHOLE,
    Activity,
    OperatorUse,
    PhaseActivity,
)
from lorameter.trial.profiling.backward import backward_times
from lorameter.trial.profiling.copies import KernelTimes, cast_times, copies_of, seconds_of, sum_copies
from lorameter.trial.profiling.products import wide_product_times

MARK = "lorameter."
"""Before the name of a phase, in the profiler's annotations."""
PART = "lorameter.part."
"""Before the name of what is told apart inside a phase."""
_RUNTIME = ("cuda", "cu")
"""How calls of the CUDA runtime and driver begin, which the profiler keeps among the records of the host."""


NO_KERNELS = (
    "the profiler recorded no kernel: CUPTI is missing, or the driver keeps it from this user "
    "(NVreg_RestrictProfilingToAdminUsers; in a container --cap-add=SYS_ADMIN lifts that)"
)


def activity_of(
    events: Iterable[Any],
    step_times_s: tuple[float, ...],
    device: str,
    *,
    phase_names: Sequence[str] = STEP_PHASES,
    weights: Mapping[tuple[int, int], str] | None = None,
) -> Activity:
    """The mean step, or request, of some that were profiled with their phases marked.

    Args:
        events: the profiler's records (`_KinetoEvent`); what lies in no phase is left out.
        step_times_s: of each of the steps, under the profiler.
        device: where they ran, as torch names it.
        phase_names: the phases, in their order.
        weights: outputs and inputs of the model's weights, and what they are called.

    Raises:
        ValueError: no phase is marked.
    """
    windows, parts, host, kernels = _sorted_out(events)
    if not windows:
        raise ValueError("no phase of a step is marked in the profiler's records")
    kind: Literal["cpu", "cuda"] = "cuda" if device.startswith("cuda") else "cpu"
    ran = _by_phase(kernels if kind == "cuda" else host, windows, phase_names)
    steps = len(step_times_s)
    times = KernelTimes(kernels, host) if kind == "cuda" else None
    copied = copies_of(host, weights or {}, times)
    apart = {
        "casts_s": cast_times(host, times),
        "wide_products_s": wide_product_times(host, times),
        "dropout_backward_s": backward_times(host, DROPOUT_OPERATOR, times),
    }
    masks = [(one.start_ns(), seconds_of(one, times)) for one in host if one.name() == DROPOUT_OPERATOR]
    counter = _Records(host)
    phases = []
    for phase in phase_names:
        spans = [end - start for start, end, name in windows if name == phase]
        kept = columns(ran[phase])
        used = _kernels(ran[phase], kept) if kind == "cuda" else _operators(ran[phase], kept)
        uses = [
            OperatorUse(name=name, category=_category(name, rule), calls=calls / steps, time_s=time_ms / 1e3 / steps)
            for name, rule, calls, time_ms in used
        ]
        called = totals(ran[phase], kept) if kind == "cpu" else []
        within = _Within(windows, phase)
        counted = {WHOLE: len(kept.start_us) / steps} if kind == "cpu" else {}
        for name, found in (*apart.items(), (DROPOUT, masks)) if kind == "cpu" else ():
            counted[name] = sum(counter.within(*span) for span in found if span[0] in within) / steps
        phases.append(
            PhaseActivity(
                phase=phase,
                window_s=sum(spans) / 1e9 / steps,
                busy_s=_busy_s(ran[phase], kept) / steps,
                operators=tuple(sorted(uses, key=lambda use: (-use.time_s, use.name))),
                totals_s={one.name: one.time_ms / 1e3 / steps for one in called},
                **{name: sum(s for start, s in found if start in within) / steps for name, found in apart.items()},
                records=counted,
                copies=sum_copies([copy for start, copy in copied if start in within], steps),
                parts_s=_parts_s([part for part in parts if part[0] in within], times, steps),
            )
        )
    missing = NO_KERNELS if kind == "cuda" and not kernels else ""
    return Activity(device=kind, step_times_s=step_times_s, phases=tuple(phases), missing=missing)


class _Records:
    """How many records of the host begin in a span of time."""

    def __init__(self, host: Sequence[Any]) -> None:
        self._starts = sorted(one.start_ns() for one in host)

    def within(self, start_ns: int, seconds: float) -> int:
        """From its beginning on for so long."""
        return bisect_right(self._starts, start_ns + round(1e9 * seconds)) - bisect_left(self._starts, start_ns)


Window = tuple[int, int, str]
"""Start and end in nanoseconds, and the phase."""


class _Within:
    """The moments of one phase, in nanoseconds."""

    def __init__(self, windows: Sequence[Window], phase: str) -> None:
        self._windows, self._phase = windows, phase
        self._starts = [start for start, _, _ in windows]

    def __contains__(self, moment: int) -> bool:
        place = bisect_right(self._starts, moment) - 1
        return place >= 0 and moment < self._windows[place][1] and self._windows[place][2] == self._phase


def _parts_s(parts: Sequence[Window], times: KernelTimes | None, steps: int) -> dict[str, float]:
    """Seconds of each part by name: the host's, or on a GPU those of the kernels that it launched meanwhile."""
    found: dict[str, float] = {}
    for start, end, name in parts:
        seconds = (end - start) / 1e9 if times is None else times.launched_s(start, end)
        found[name] = found.get(name, 0.0) + seconds / steps
    return found


def _sorted_out(events: Iterable[Any]) -> tuple[list[Window], list[Window], list[Any], list[Any]]:
    """Windows of the phases in order, those of parts, the operators of the host, what ran on the device."""
    windows: list[Window] = []
    parts: list[Window] = []
    host: list[Any] = []
    device: list[Any] = []
    for event in events:
        name, marked = event.name(), event.is_user_annotation()
        if event.device_type() == DeviceType.CPU:
            if marked and name.startswith(PART):
                parts.append((event.start_ns(), event.end_ns(), name.removeprefix(PART)))
            elif marked and name.startswith(MARK):
                windows.append((event.start_ns(), event.end_ns(), name.removeprefix(MARK)))
            elif not (marked or event.is_async() or _is_runtime(name)):
                host.append(event)
        elif event.device_type() == DeviceType.CUDA and not (marked or event.is_hidden_event()):
            device.append(event)
    return sorted(windows), parts, host, device


def _is_runtime(name: str) -> bool:
    """`cudaLaunchKernel` and `cuMemcpyAsync`, but no operator, whose name has a namespace or is a class's."""
    return (name.startswith(_RUNTIME) and "::" not in name) or name.startswith("[")


def _by_phase(events: Iterable[Any], windows: list[Window], phase_names: Sequence[str]) -> dict[str, Events]:
    found = {phase: Events() for phase in phase_names}
    starts = [start for start, _, _ in windows]
    number = count()  # two calls with the same times are two calls
    for event in events:
        place = bisect_right(starts, event.start_ns()) - 1
        if place < 0 or event.start_ns() >= windows[place][1]:
            continue
        lane = (str(event.device_index()), str(event.start_thread_id() or event.device_resource_id()))
        start_us = (event.start_ns() - starts[0]) / 1e3
        duration_us = (event.end_ns() - event.start_ns()) / 1e3
        found[windows[place][2]].add(event.name(), lane, start_us, duration_us, next(number))
    return found


Used = Iterator[tuple[str, Rule | None, int, float]]
"""Name, rule, calls and milliseconds."""


def _operators(events: Events, kept: EventArrays) -> Used:
    for one in operator_times(events, kept):
        yield one.name, one.rule, one.calls, one.time_ms


def _kernels(events: Events, kept: EventArrays) -> Used:
    for one in totals(events, kept):
        yield one.name, classify(one.name), one.calls, one.time_ms


def _category(name: str, rule: Rule | None) -> str:
    return "other" if rule is None else rule.category_of(name)


def _busy_s(events: Events, kept: EventArrays) -> float:
    """Length of the union of all intervals, in seconds."""
    share = busy_share(events, kept)
    if share is None:
        return 0.0
    return share * float((kept.start_us + kept.duration_us).max() - kept.start_us.min()) / 1e6
