"""What a plan would measure, in which order, and what that is expected to take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lorameter.machine.provenance import Machine
from lorameter.records.record import Notice
from lorameter.records.units import format_bytes, format_count, format_duration, format_percent
from lorameter.report.blocks import Document, Span, say, say_each
from lorameter.report.notices import warn_before_run
from lorameter.run.budget import DROPPABLE
from lorameter.run.forecast import Forecast
from lorameter.run.forecast_time import TimeForecast
from lorameter.run.plan import Plan
from lorameter.studies.protocol import Protocol


def describe_plan(
    plan: Plan, expected: Forecast, machine: Machine, notices: Sequence[Notice], data: str | None = None
) -> Document:
    """A line a replicate, the level and why, estimates of time, width, memory and disk, and the kind of the `data`."""
    size = f": {format_count(len(plan.slots), 'trial')} on {machine.device_name}"
    return (
        say(Span(text=plan.study.title, tone="strong"), size, indented=False),
        *say_each(_lines(plan, expected)),
        *say_each([f"data    {data}"] if data else []),
        *warn_before_run(notices),
    )


def _lines(plan: Plan, expected: Forecast) -> Iterator[str]:
    for replicate in range(plan.study.protocol.replicates):
        groups = [group for group in plan.groups if group.replicate == replicate]
        names = "; ".join(", ".join(slot.trial.partition("-")[2] for slot in group.slots) for group in groups)
        yield f"replicate {replicate + 1}: {names}"
    yield f"level   {plan.interleaving}: {plan.why}"
    yield from _estimates(expected.time, plan.study.protocol)
    for what, size, words in (
        ("memory", expected.memory_bytes, " for what is live together, processes included"),
        ("disk  ", expected.disk_bytes, ""),
    ):
        known = f"unknown ({expected.unknown})" if size is None else f"estimate: {format_bytes(size)}{words}"
        yield f"{what}  {known}"


def _estimates(time: TimeForecast, protocol: Protocol) -> Iterator[str]:
    """Time, replicates, and the width of the intervals."""
    took = "unknown" if time.time_s is None else f"estimate: {format_duration(time.time_s)}"
    yield f"time    {took} ({time.basis})"
    if protocol.max_minutes is None:
        yield f"fits    {format_count(protocol.replicates, 'replicate')}, as planned: no time limit"
    elif time.replicates is not None:
        skipped = f", without {', '.join(DROPPABLE[part] for part in DROPPABLE if part in time.skipped)}"
        fitting = (
            f"{time.replicates} of {format_count(protocol.replicates, 'replicate')} in {protocol.max_minutes:g} min"
        )
        yield f"fits    estimate: {fitting}{skipped if time.skipped else ''}"
    if time.half_width is None and time.sought_width_s is None:
        return
    width = "no interval from one replicate"
    if time.half_width is not None:
        width = f"estimate: intervals of training ratios of ± {format_percent(time.half_width)} ({time.noise})"
    sought_s = time.sought_width_s
    needed = "the time for ± 3 % is unknown" if sought_s is None else f"± 3 % takes about {format_duration(sought_s)}"
    yield f"width   {width}; {needed}"
