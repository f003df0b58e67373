"""A comparison as a document: a row for each metric of each variant, and below it what no table can say.

What is inconclusive is a sentence, what is wrong is its reason, and the statistics of the rest are folded. Whatever is
shown of a comparison, here or by the gate, has these rows with these digits.
"""

from __future__ import annotations

from collections.abc import Iterator

from lorameter.records.units import first_few
from lorameter.report.blocks import (
    Block,
    Cell,
    Collapsible,
    ColumnHeader,
    Document,
    Line,
    Row,
    Section,
    Span,
    Table,
    collapse_constant_columns,
    list_sections,
    say,
    say_invalid,
    tone_of,
    write_ratio,
    write_row,
)
from lorameter.report.notices import describe_notices
from lorameter.report.phrases import format_effect, format_inconclusive, title_of, title_of_ratio, verdict_cell
from lorameter.stats import Verdict
from lorameter.verdicts.compare_pairs import MARGIN
from lorameter.verdicts.comparison_input import is_memory
from lorameter.verdicts.comparison_report import EXIT_OF, PRECEDENCE, ComparisonReport, ComparisonRow

HEADS = (
    ColumnHeader(text="variant"),
    ColumnHeader(text="metric"),
    ColumnHeader(text="candidate / base", right=True, ratio=True),
    ColumnHeader(text="verdict"),
    ColumnHeader(text="tolerance", right=True, drop_priority=3, collapse_if_constant=True),
    ColumnHeader(text="replicates", right=True, drop_priority=2, collapse_if_constant=True),
)
NAMED = 3
"""Comparisons that are named where several have one reason."""
MOST_FINDINGS = 6
"""Findings that are not folded; the table has them all."""


def describe_comparison(report: ComparisonReport, *, ab: bool = False) -> Document:
    """What was found, the table with the controls, and what else differs; `ab`: whether both sides were measured in
    one job."""
    lines = tuple(list_findings(report, ab=ab))
    more = lines[MOST_FINDINGS:]
    folded = Collapsible(summary=say(Span(text=f"and {len(more)} more", tone="faint")), lines=more)
    return (
        *say_invalid(report.why_invalid),
        Section(title=title_of_report(report), lines=lines[:MOST_FINDINGS], blank_line_before=False),
        *([folded] if more else []),
        collapse_constant_columns(
            Table(heads=HEADS, rows=tuple(write_rows(report)), notes=tuple(_notes(report)), blank_line_before=True)
        ),
        *_statistics(report),
        *list_sections({"Differing": list_differences(report)}),
        *describe_notices(report.notices),
    )


def title_of_report(report: ComparisonReport) -> str:
    """Which side is judged by which."""
    return f"{report.candidate} against {report.base}"


def write_rows(report: ComparisonReport) -> Iterator[Row]:
    """A row a comparison, in the order of `HEADS`."""
    for compared in report.comparisons:
        count = compared.replicates
        yield write_row(
            compared.name,
            title_of_ratio(compared.metric),
            write_compared(compared),
            write_verdict(compared),
            Cell(text=f"{100 * compared.tolerance:.3g} %", value=compared.tolerance, unit="1"),
            Cell(text=str(count), value=count, unit="1") if count else Cell(text="–"),
        )


def write_verdict(compared: ComparisonRow) -> Cell:
    """The finding in a word, with what equal is."""
    margin = compared.tolerance if is_memory(compared.metric) else compared.margin
    return verdict_cell(compared, compared.metric, margin, "sides")


def write_compared(compared: ComparisonRow) -> Cell:
    """The ratio; of peaks without a bracket, since the largest against the largest has no interval."""
    ratio = compared.ratio
    if is_memory(compared.metric) and ratio is not None:
        return Cell(text=f"{ratio:.4g}", value=ratio, unit="1")
    return write_ratio(compared)


def list_findings(report: ComparisonReport, *, ab: bool = False) -> Iterator[Line]:
    """What decides, the worst first: what has regressed, improved, or is inconclusive; each reason once."""
    order = {code: place for place, code in enumerate(PRECEDENCE)}
    found = [one for one in report.comparisons if one.verdict != "equivalent"]
    found.sort(key=lambda one: order[EXIT_OF[one.verdict]])
    said: dict[tuple[Verdict, str], list[str]] = {}
    for compared in found:
        said.setdefault((compared.verdict, _finding(compared, ab=ab)), []).append(name_of(compared))
    for (verdict, sentence), names in said.items():
        word = Span(text=_WORDS.get(verdict, verdict), tone=tone_of(verdict))
        yield say(f"{first_few(names, NAMED, '; ')}: ", *([] if verdict == "inconclusive" else [word]), sentence)
    if report.comparisons and not found:
        yield say(Span(text="equivalent", tone="note"), ", each within its margin")


_WORDS: dict[str, str] = {"no_baseline": "no baseline", "not_comparable": "not comparable"}


def _finding(compared: ComparisonRow, *, ab: bool) -> str:
    comparison, verdict = compared, compared.verdict
    if verdict == "inconclusive":
        return format_inconclusive(comparison, compared.metric, compared.interleaving, ab=ab)
    if verdict in ("regressed", "improved"):
        return f", {format_effect(comparison, compared.metric)}"
    return f": {comparison.reason}"


def name_of(compared: ComparisonRow) -> str:
    """Which comparison it is, in words."""
    return f"{compared.name}, {title_of(compared.metric)}"


def list_controls(report: ComparisonReport) -> tuple[str, ...]:
    """What the control of each phase says."""
    said = []
    for phase, control in report.control.items():
        word = "not measured"
        if control is not None:
            cell = verdict_cell(control, "", MARGIN, "variants")
            word = f"{write_ratio(control).line} {cell.said or cell.verdict}"
        said.append(f"control of {phase}: {word}")
    return tuple(said)


def list_differences(report: ComparisonReport) -> tuple[str, ...]:
    """What else is not alike in the two sides."""
    return tuple(map(str, report.differing))


def _notes(report: ComparisonReport) -> Iterator[Line]:
    yield from map(say, list_controls(report))
    if any(is_memory(one.metric) for one in report.comparisons):
        yield say(Span(text="peaks: the largest of the candidate over the largest of the base", tone="faint"))


def _statistics(report: ComparisonReport) -> Iterator[Block]:
    reasons: dict[str, list[str]] = {}
    for compared in report.comparisons:
        reasons.setdefault(compared.reason, []).append(name_of(compared))
    lines = tuple(
        say(f"{first_few(names, NAMED, '; ')}: ", Span(text=reason, tone="faint")) for reason, names in reasons.items()
    )
    if lines:
        count = f"{len(report.comparisons)} verdicts rest" if len(report.comparisons) > 1 else "the verdict rests"
        yield Section(title="Statistics")
        yield Collapsible(summary=say(Span(text=f"what {count} on", tone="faint")), lines=lines)
