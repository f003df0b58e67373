"""Where the time of a step, or of a request, goes: its phases, and what ran in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lorameter.profile.accounting import IDLE, REMAINDER_LIMIT, StepAccount, TimeSpan, categories_s, plain_s
from lorameter.profile.facts import Watched
from lorameter.records.units import format_count, format_interval, format_ratio, format_value
from lorameter.report.blocks import (
    Cell,
    Table,
    name_columns,
    say_each,
    value_cell,
    write_row,
    write_seconds,
    write_share,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """Words for what is profiled, and its phases."""

    what: str
    titles: Mapping[str, str]
    aside: str
    """What goes on between two of them."""


OF_STEPS = Words(
    what="step",
    titles={
        "data": "data: taking the batch",
        "forward": "forward",
        "backward": "backward",
        "update": "clipping and optimizer",
    },
    aside="the loss read and the times kept",
)
OF_REQUESTS = Words(
    what="request",
    titles={
        "prepare": "before the first forward pass",
        "prefill": "prefill: the pass over the prompt",
        "decode": "decode: passes over one token",
        "choose": "between passes and after the last",
    },
    aside="its times kept",
)
TOP = 8
"""Operators that are shown by name."""
NAME_WIDTH = 80


def tabulate_phases(profile: Watched, step: StepAccount, words: Words = OF_STEPS, *, beside: str = "") -> Table:
    """A row a phase, the remainder that no phase explains, and the step; below it what the times rest on. `beside` is
    added to the title."""
    waits = "device waits" if profile.device == "cuda" else "between operators"
    known = not profile.activity.missing
    calls = "launches" if profile.device == "cuda" else "operators"
    idling = categories_s(profile, step).get(IDLE, {})
    rows = []
    for phase in profile.activity.phases:
        span = step.phases[phase.phase]
        rows.append(
            write_row(
                words.titles[phase.phase],
                _time(span),
                write_share(span.value / step.step.value),
                Cell(text=f"{idling[phase.phase] / span.value:.0%}" if known else "–"),
                _count(phase.calls if known else None),
            )
        )
    rest = step.remainder
    rows.append(write_row("remainder", _time(rest), _shares(rest, step.step.value), "", ""))
    total = _count(profile.activity.calls if known else None)
    rows.append(write_row(words.what, _time(step.step), "100 %", "", total, strong=True))
    return Table(
        title=f"Where a {words.what}'s time goes{beside}",
        heads=name_columns("phase", "time", f"of the {words.what}", waits, calls),
        rows=tuple(rows),
        notes=say_each(_step_lines(step, words)),
    )


def _time(span: TimeSpan) -> Cell:
    return value_cell(span.value, span.low, span.high, "s")


def _count(calls: float | None) -> Cell:
    return Cell(text="–") if calls is None else Cell(text=f"{calls:.0f}", value=calls, unit="1")


def _shares(span: TimeSpan, whole: float) -> Cell:
    """A part of a whole in percent, with its interval where it has one."""
    share = write_share(span.value / whole)
    if span.low is None or span.high is None:
        return share
    low, high = span.low / whole, span.high / whole
    return dataclasses.replace(share, interval=f"[{low:.1%}, {high:.1%}]", low=low, high=high)


def _step_lines(step: StepAccount, words: Words) -> Iterator[str]:
    borders, between = step.borders, step.between
    quiet = "undisturbed" if step.counted < step.pairs else "all"
    what = words.what
    yield f"{step.pairs} plain {what}s, in turns with as many whose phases were timed; {step.counted} count ({quiet})"
    yield "intervals are those of this process; between processes times differ more"
    yield (
        f"borders between phases cost {format_interval(borders.value, borders.low, borders.high, 's')} a {what}; in "
        f"such a {what} the phases cover {_shares(step.covered, 1.0).line} of it"
    )
    yield f"between {what}s, {words.aside}: {format_interval(between.value, between.low, between.high, 's')}"
    if step.occupancy is not None:
        yield f"occupancy {step.occupancy:.0%}: CPU time over wall time of all these {what}s"
    limit = f"{REMAINDER_LIMIT:.0%} of the {what}"
    if step.explained is None:
        yield f"whether the remainder is at most {limit} is inconclusive: measure again on a quieter machine"
    elif not step.explained:
        yield f"the phases do not explain the {what}: the remainder is more than {limit}"


def tabulate_categories(profile: Watched, step: StepAccount, words: Words = OF_STEPS, *, beside: str = "") -> Table:
    """A row for each kind of work, by phase; below it the dearest operators by name."""
    what = "kernels" if profile.device == "cuda" else "operators, each without those that it calls"
    rows = []
    for category, by_phase in categories_s(profile, step).items():
        seconds = sum(by_phase.values())
        times = (write_seconds(by_phase[phase]) if by_phase[phase] else "–" for phase in step.phases)
        rows.append(write_row(category, write_share(seconds / step.step.value), write_seconds(seconds), *times))
    return Table(
        title=f"What ran{beside}: {what}",
        heads=name_columns("category", f"of the {words.what}", "time", *step.phases),
        rows=tuple(rows),
        notes=say_each(_operators(profile, step, words)),
        blank_line_before=True,
    )


def _operators(profile: Watched, step: StepAccount, words: Words) -> Iterator[str]:
    steps, slow = len(profile.activity.step_times_s), profile.activity.window_s
    slower = step.profiler_slowdown
    seen = (
        f"seen in {format_count(steps, words.what)} under the profiler, each {format_value(slow, 's')} "
        f"(× {format_ratio(slower.value, slower.low, slower.high)})"
    )
    if profile.activity.missing:
        yield f"not available: {profile.activity.missing}"
        return
    if profile.activity.device == "cuda":
        yield f"{seen}, which slows down the host and no kernel"
    else:
        yield f"{seen}; times are shares of a phase there, of the phase above"
    uses = [
        (plain_s(profile, step, phase, use.time_s), use, phase.phase)
        for phase in profile.activity.phases
        for use in phase.operators
    ]
    for seconds, use, phase_name in sorted(uses, key=lambda found: -found[0])[:TOP]:
        name = use.name if len(use.name) <= NAME_WIDTH else f"{use.name[: NAME_WIDTH - 1]}…"
        share = seconds / step.step.value
        yield f"{share:6.1%}  {use.calls:6.0f} calls  {phase_name:8}  {use.category:11}  {name}"
