"""Notices, each with its remedy: at the end of a report, or before what they warn of is measured."""

from __future__ import annotations

from collections.abc import Sequence

from harness.records.record import Notice
from harness.report.table import Document, Line, Section, Span, say


def describe_notices(notices: Sequence[Notice]) -> Document:
    """A section of them; nothing where there are none."""
    return (Section(title="Notices", lines=tuple(map(_line, notices))),) if notices else ()


def _line(notice: Notice) -> Line:
    remedy = Span(text=notice.remedy, tone="faint")
    return say(Span(text=notice.code, tone="warning"), f"  {notice.message} ", remedy)
