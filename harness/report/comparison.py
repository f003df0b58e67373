"""A comparison as a document: a row for each metric of each variant, the reasons below, so that nothing is cut.

Whatever is shown of a comparison, here or by the gate in another format, has these rows with these digits.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.records.metrics import METRICS
from harness.records.units import first_few
from harness.report.table import (
    Cell,
    Document,
    Head,
    Line,
    Row,
    Span,
    Table,
    list_sections,
    name_columns,
    say,
    say_each,
    write_ratio,
    write_row,
)
from harness.stats import Comparison
from harness.verdicts.comparand import is_memory
from harness.verdicts.outcome import Compared, ComparisonReport

HEADS = (
    *name_columns("variant", "metric", "candidate / base", "verdict", "tolerance", "replicates", left=2),
    Head(text="reason"),
)
NAMED = 3
"""Comparisons that are named where several have one reason."""


def describe_comparison(report: ComparisonReport) -> Document:
    """The table without its reasons, and below it each reason once with what it is the reason of."""
    rows = tuple(Row(cells=row.cells[:-1]) for row in write_rows(report))
    notes = (*say_each(list_controls(report)), *_reasons(report))
    lists = {"Differing": list_differences(report), "Notices": list_notices(report)}
    return (
        say(Span(text=title_of(report), tone="strong"), indented=False),
        Table(heads=HEADS[:-1], rows=rows, notes=notes),
        *list_sections(lists),
    )


def title_of(report: ComparisonReport) -> str:
    """Which side is judged by which."""
    return f"{report.candidate} against {report.base}"


def write_rows(report: ComparisonReport) -> tuple[Row, ...]:
    """A row a comparison, in the order of `HEADS`."""
    return tuple(
        write_row(
            compared.variant,
            metric_of(compared),
            write_compared(compared),
            Cell(verdict=compared.verdict),
            f"{100 * compared.tolerance:.3g} %",
            _replicates(compared.comparison),
            compared.comparison.reason,
        )
        for compared in report.comparisons
    )


def metric_of(compared: Compared) -> str:
    """The metric's title; of one that another program measured, its name."""
    return METRICS[compared.metric].title if compared.metric in METRICS else compared.metric


def write_compared(compared: Compared) -> Cell:
    """The ratio; of peaks without a bracket, since the largest against the largest has no interval."""
    ratio = compared.comparison.ratio
    if is_memory(compared.metric) and ratio is not None:
        return Cell(text=f"{ratio:.4g} (largest)", value=ratio, unit="1")
    return write_ratio(compared.comparison)


def list_controls(report: ComparisonReport) -> tuple[str, ...]:
    """What the control of each phase says."""
    return tuple(
        f"control of {phase}: "
        + ("not measured" if control is None else write_ratio(control, verdict=control.verdict).line)
        for phase, control in report.control.items()
    )


def list_differences(report: ComparisonReport) -> tuple[str, ...]:
    """What else is not alike in the two sides."""
    return tuple(map(str, report.differing))


def list_notices(report: ComparisonReport) -> tuple[str, ...]:
    """What a reader of the numbers must know, with what to do about it."""
    return tuple(f"{notice.code}: {notice.message} {notice.remedy}" for notice in report.notices)


def _reasons(report: ComparisonReport) -> Iterator[Line]:
    reasons: dict[str, list[str]] = {}
    for compared in report.comparisons:
        reasons.setdefault(compared.comparison.reason, []).append(f"{compared.variant}, {metric_of(compared)}")
    for reason, names in reasons.items():
        yield say(f"{first_few(names, NAMED, '; ')}: ", Span(text=reason, tone="faint"))


def _replicates(comparison: Comparison) -> str:
    """How many, and for an open question how many would settle it."""
    if not comparison.replicates:
        return "–"
    needed = comparison.replicates_needed if comparison.verdict == "inconclusive" else None
    return f"{comparison.replicates} of {needed}" if needed else str(comparison.replicates)
