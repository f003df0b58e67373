"""Describes notices with their remedies, at the end of a report or before a measurement.

Notices of the same kind form one line, which expands.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorameter.records.record import Notice
from lorameter.report.blocks import Collapsible, Document, Line, Section, Span, say


def describe_notices(notices: Sequence[Notice]) -> Document:
    """A line for each kind of notice, in order; empty without notices."""
    kinds: dict[str, list[Notice]] = {}
    for notice in notices:
        kinds.setdefault(notice.code, []).append(notice)
    collapsibles = []
    for alike in kinds.values():
        first, more = alike[0], f" (and {len(alike) - 1} more)" if len(alike) > 1 else ""
        collapsibles.append(Collapsible(summary=_line(first, more), lines=tuple(map(_line, alike))))
    return (Section(title="Notices"), *collapsibles) if collapsibles else ()


def warn_before_run(notices: Sequence[Notice]) -> Document:
    """All notices in full, before the measurement, when the user can still act on them."""
    return (Section(title="Notices", lines=tuple(map(_line, notices))),) if notices else ()


def _line(notice: Notice, more: str = "") -> Line:
    code, remedy = Span(text=f"{notice.code}{more}", tone="warning"), Span(text=notice.remedy, tone="faint")
    return say(code, f"  {notice.message} ", remedy)
