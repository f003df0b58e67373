"""What the doctor found: what can run, what can be measured, what would spoil it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import get_args

from lorameter.machine.doctor.checks import About, DoctorCheck, Grade
from lorameter.report.blocks import Block, Cell, Document, Span, Table, name_columns, say, write_row

TITLES: dict[About, str] = {
    "runs": "What this machine can run",
    "measures": "What it can measure",
    "spoils": "What would disturb a measurement here",
}


def describe_checks(checks: Sequence[DoctorCheck], *, fit: bool) -> Document:
    """A table for each of the three questions, and the answer in one line."""
    return tuple(_blocks(checks, fit=fit))


def _blocks(checks: Sequence[DoctorCheck], *, fit: bool) -> Iterator[Block]:
    for about, title in TITLES.items():
        asked = (check for check in checks if check.about == about)
        rows = tuple(
            write_row(check.name, Cell(verdict=check.grade), check.found, Cell(detail=check.remedy)) for check in asked
        )
        yield Table(title=title, heads=name_columns("", "", "found", "remedy", left=4), rows=rows)
    counts = Counter(check.grade for check in checks)
    said = ", ".join(f"{counts[grade]} {grade}" for grade in get_args(Grade) if counts[grade])
    answer = _fit(counts["bad"]) if fit else _unfit()
    yield say("This machine is ", *answer, f". Checks: {said}.", indented=False)


def _fit(bad: int) -> tuple[Span, ...]:
    if not bad:
        return (Span(text="fit to measure", tone="good"),)
    return Span(text="fit to measure, with less precision", tone="warning"), Span(text=": mend what is bad first")


def _unfit() -> tuple[Span, Span]:
    return Span(text="unfit", tone="alarm"), Span(text=": what it measured would not count")
