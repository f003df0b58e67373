"""What the time of a run went to: how much of it was measurement, and how many turns each replicate took."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lorameter.records.time_breakdown import TimeBreakdown
from lorameter.records.units import format_duration, format_percent
from lorameter.report.blocks import Block, Collapsible, Line, Section, Span, say

SAID = {
    "steps": "timed steps", "requests": "requests", "open_ended": "requests to their end", "merged": "merged requests",
    "cold": "cold starts",
}  # fmt: skip


def describe_spending(spending: TimeBreakdown | None) -> Iterator[Block]:
    """A section on the time of a run that has said what it went to."""
    if spending is None:
        return
    of_limit = "" if spending.limit_s is None else f" of {format_duration(spending.limit_s)}"
    summary = f"{format_duration(spending.wall_s)}{of_limit}, {format_percent(spending.share)} of it measurement"
    yield Section(title="Time")
    yield Collapsible(summary=say(Span(text=summary, tone="faint")), lines=tuple(_lines(spending, of_limit)))


def _lines(spending: TimeBreakdown, of_limit: str) -> Iterator[Line]:
    parts = [f"{SAID[kind]} {format_duration(took)}" for kind, took in spending.measured_s.items() if kind in SAID]
    measured = f": {', '.join(parts)}" if parts else ""
    wall = format_duration(spending.wall_s)
    yield say(f"{format_percent(spending.share)} of {wall}{of_limit} was measurement{measured}")
    if spending.turns:
        yield say(f"timed turns of each trial, by replicate: {', '.join(map(str, spending.turns))}")


def encode_spending(spending: TimeBreakdown | None) -> dict[str, Any]:
    """The same for programs, as `time`; nothing of a run that does not say it."""
    if spending is None:
        return {}
    return {
        "time": {
            "limit_s": spending.limit_s,
            "wall_s": spending.wall_s,
            "measured_s": dict(spending.measured_s),
            "measured_share": spending.share,
            "turns": list(spending.turns),
        }
    }
