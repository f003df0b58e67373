"""The report of a run: what was measured and how, a table a phase, what failed, what to know, how the run stands."""

from __future__ import annotations

from collections.abc import Iterator

from harness.report.notices import describe_notices
from harness.report.table import (
    Block,
    Document,
    Line,
    Row,
    Section,
    Span,
    Table,
    list_sections,
    name_columns,
    say,
    say_each,
    write_ratio,
)
from harness.report.view import PhaseTable, RunView


def describe_run(view: RunView) -> Document:
    """All of a run's report."""
    return tuple(_blocks(view))


def _blocks(view: RunView) -> Iterator[Block]:
    yield Section(title=view.title, lines=say_each(view.facts), apart=False)
    yield from list_sections({"Differs from the study as written": view.deviations, "Notes": view.notes})
    yield from map(_table, view.tables)
    if view.failures:
        yield Section(title="Trials without a result", lines=say_each(view.failures), tone="bad")
    yield from describe_notices(view.notices)
    counted = ", ".join(f"{count} {status}" for status, count in view.counts.items()) or "none yet"
    yield say(f"Trials: {counted}. Run {view.run} in {view.path}", indented=False, apart=True)
    if view.state != "complete":
        what = f" ({view.state}): what is shown is what there is."
        yield say(Span(text="This run is not complete", tone="alarm"), what, indented=False)
    elif not view.valid:
        where = " see the notices and trials above."
        yield say(Span(text="This run is invalid:", tone="alarm"), where, indented=False)


def _table(table: PhaseTable) -> Table:
    return Table(
        title=table.title,
        heads=name_columns(*table.heads),
        rows=tuple(Row(cells=row.cells, strong=row.reference) for row in table.rows),
        stacked=True,
        notes=(*([] if table.alone else [_control(table)]), *([say(table.note)] if table.note else [])),
        apart=True,
    )


def _control(table: PhaseTable) -> Line:
    control = table.control
    if control is None:
        return say("control: not measured")
    said = write_ratio(control, verdict=control.verdict).line
    return say(f"control (the reference measured twice): {said}; ", Span(text=control.reason, tone="faint"))
