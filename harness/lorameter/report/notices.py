"""Notices, each with its remedy: at the end of a report, or before what they warn of is measured.

Those of one kind are one line, which unfolds.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorameter.records.record import Notice
from lorameter.report.blocks import Block, Collapsible, Document, Line, Section, Span, say


def describe_notices(notices: Sequence[Notice]) -> Document:
    """A line for each kind of them, in the order in which they come; nothing where there are none."""
    kinds: dict[str, list[Notice]] = {}
    for notice in notices:
        kinds.setdefault(notice.code, []).append(notice)
    folds: list[Block] = [_fold(alike) for alike in kinds.values()]
    return (Section(title="Notices"), *folds) if folds else ()


def warn_before_run(notices: Sequence[Notice]) -> Document:
    """All of each: before anything is measured, when there is still something to be done about them."""
    return (Section(title="Notices", lines=tuple(map(_line, notices))),) if notices else ()


def _fold(alike: Sequence[Notice]) -> Collapsible:
    first, *others = alike
    more = f" (and {len(others)} more)" if others else ""
    code = Span(text=f"{first.code}{more}", tone="warning")
    return Collapsible(summary=say(code, f"  {first.message} {first.remedy}"), lines=tuple(map(_line, alike)))


def _line(notice: Notice) -> Line:
    remedy = Span(text=notice.remedy, tone="faint")
    return say(Span(text=notice.code, tone="warning"), f"  {notice.message} ", remedy)
