"""A comparison of two sides as a document, and what the gate, an A/B, several A/B runs and a bisection make of it.

What is inconclusive is a sentence, what is wrong is its reason, and the statistics of the rest are folded. Whatever is
shown of a comparison has these rows with these digits.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorameter.records import codec
from lorameter.records.metrics import METRICS, PHASE_TITLES
from lorameter.records.units import first_few
from lorameter.report.blocks import (
    Axis,
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
    Tone,
    collapse_constant_columns,
    list_sections,
    name_columns,
    say,
    say_invalid,
    tone_of,
    write_ratio,
    write_row,
)
from lorameter.report.figure import Figure, Intervals, Mark
from lorameter.report.notices import describe_notices
from lorameter.report.phrases import format_effect, format_inconclusive, title_of, title_of_ratio, verdict_cell
from lorameter.run.bisect import Bisection, Look
from lorameter.stats import Verdict
from lorameter.verdicts.compare import MARGIN
from lorameter.verdicts.comparison_input import is_memory
from lorameter.verdicts.comparison_report import EXIT_OF, PRECEDENCE, ComparisonReport, ComparisonRow

if TYPE_CHECKING:
    from lorameter.records.store import Run
    from lorameter.verdicts.ab import Attribution
    from lorameter.verdicts.gate import GateResult

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


MOST_PACKAGES = 12
"""Packages that are listed; an interpreter of its own differs in hundreds."""


def describe_attribution(attribution: Attribution, run: Run) -> Document:
    """Facts of the run, differing packages, and the ratio of each part of the work with its interval."""
    facts = (
        *_describe_sides(run),
        *_list_packages(attribution),
        *(("differs", str(one)) for one in attribution.differing),
    )
    table = Table(
        title="Where the time went (one by one, not corrected for looking at all)",
        heads=(
            ColumnHeader(text="variant"),
            ColumnHeader(text="part"),
            ColumnHeader(text="candidate / base", right=True, ratio=True),
        ),
        rows=tuple(
            write_row(part.variant, title_of_ratio(part.metric), write_ratio(part)) for part in attribution.parts
        ),
        blank_line_before=True,
    )
    return (Section(title="Sides", lines=tuple(say(said, label=name) for name, said in facts)), table)


def _describe_sides(run: Run) -> Iterator[tuple[str, str]]:
    for name in ("base", "candidate"):
        side = run.manifest.sides[name]
        yield name, f"{side['label']}, harness {side['worker']}"
    yield "level", f"{run.manifest.interleaving}: {run.manifest.why}"
    if run.manifest.stopped:
        yield "stopped", run.manifest.stopped


def _list_packages(attribution: Attribution) -> Iterator[tuple[str, str]]:
    names = list(attribution.packages)
    for name in names[:MOST_PACKAGES]:
        base, candidate = attribution.packages[name]
        yield "package", f"{name}: {base or 'not installed'} → {candidate or 'not installed'}"
    if len(names) > MOST_PACKAGES:
        yield "package", f"and {len(names) - MOST_PACKAGES} more"


def describe_gate(result: GateResult, *, ab: bool = False) -> Document:
    """Whether the gate is passed and why, then the comparison; `ab`: whether both sides were measured in one job."""
    unmet = tuple(say(Span(text=line, tone="bad")) for line in result.unmet)
    tone: Tone = "good" if result.passed else "bad"
    invalid = result.report.why_invalid
    outcome = Section(title=outcome_of(result), tone=tone, lines=unmet, blank_line_before=False, last=invalid is None)
    first = say_invalid(invalid)
    return (*first, outcome, *describe_comparison(result.report, ab=ab)[len(first) :])


def outcome_of(result: GateResult) -> str:
    """Whether the gate is passed, with which exit code, and how many verdicts of each kind there are."""
    counts = Counter(compared.verdict for compared in result.report.comparisons)
    words = [f"{count} {verdict.replace('_', ' ')}" for verdict, count in counts.items()]
    counted = ", ".join(words) or "nothing compared"
    return f"Gate {'passed' if result.passed else 'failed'} (exit {result.exit_code}): {counted}"


def figures_of_comparison(report: ComparisonReport) -> tuple[Figure, ...]:
    """A figure a phase; ratios that could not be computed are in none."""
    by_phase: dict[str, list[ComparisonRow]] = {}
    for compared in report.comparisons:
        if compared.ratio is not None:
            known = METRICS.get(compared.metric)
            by_phase.setdefault("Others" if known is None else PHASE_TITLES[known.phase], []).append(compared)
    return tuple(_figure(title, found) for title, found in by_phase.items())


def _figure(title: str, found: list[ComparisonRow]) -> Figure:
    marks = tuple(
        Mark(
            name=f"{one.name}, {title_of_ratio(one.metric)}", value=one.ratio, low=one.low,
            high=one.high, verdict=one.verdict,
        )
        for one in found
        if one.ratio is not None
    )  # fmt: skip
    rows = tuple(
        write_row(one.name, title_of_ratio(one.metric), write_ratio(one, verdict=one.verdict)) for one in found
    )
    return Figure(
        title=f"{title}: candidate / base",
        says="A dot is the candidate's value as a multiple of the base's, the line through it its interval; right of "
        "1 is worse.",
        drawing=Intervals(axis=Axis(title="candidate / base; right of 1 is worse", line_at=1.0), marks=marks),
        table=Table(heads=name_columns("variant", "metric", "candidate / base", left=2), rows=rows),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixRun:
    """One A/B run: the study that it measured, and what it found."""

    run: str
    study: str
    report: ComparisonReport

    @property
    def name(self) -> str:
        """What changed."""
        return f"{self.report.candidate} against {self.report.base}"


def describe_matrix(changes: Sequence[MatrixRun]) -> Document:
    """A row for each metric of each variant of each study, a column for each change."""
    twice = Counter((change.study, change.name) for change in changes)
    names = [one.name if twice[one.study, one.name] == 1 else f"{one.name}, run {one.run}" for one in changes]
    columns = list(dict.fromkeys(names))
    cells: dict[tuple[str, str, str], dict[str, ComparisonRow]] = {}
    for change, name in zip(changes, names, strict=True):
        for compared in change.report.comparisons:
            cells.setdefault((change.study, compared.name, compared.metric), {})[name] = compared
    heads = [
        ColumnHeader(text="study", collapse_if_constant=True),
        ColumnHeader(text="variant", collapse_if_constant=True),
        ColumnHeader(text="metric", collapse_if_constant=True),
    ]
    heads += [ColumnHeader(text=name, right=True) for name in columns]
    rows = [
        write_row(study, variant, title_of_ratio(metric), *(_matrix_cell(found.get(name)) for name in columns))
        for (study, variant, metric), found in cells.items()
    ]
    return (
        say(Span(text="Studies by changes of versions", tone="strong"), indented=False),
        Table(
            heads=tuple(heads),
            rows=tuple(rows),
            notes=(_matrix_note(), *map(_matrix_run, changes)),
            blank_line_before=True,
        ),
    )


def encode_matrix(changes: Sequence[MatrixRun]) -> list[dict[str, Any]]:
    """A row a comparison, with its run, its study and its sides."""
    return [
        {
            "run": change.run, "study": change.study, "base": change.report.base, "candidate": change.report.candidate,
            **codec.to_json(one),
        }
        for change in changes
        for one in change.report.comparisons
    ]  # fmt: skip


def _matrix_cell(compared: ComparisonRow | None) -> Cell:
    if compared is None:
        return Cell(text="–")
    verdict = write_verdict(compared)
    return dataclasses.replace(write_compared(compared), verdict=verdict.verdict, said=verdict.said)


def _matrix_note() -> Line:
    return say(Span(text="candidate over base, above 1 is worse; each cell is of its own run", tone="faint"))


def _matrix_run(change: MatrixRun) -> Line:
    return say(f"{change.study}, {change.name}: run {change.run}")


_LOOKS = name_columns("compared with the good end", "ratio", "replicates", "is")


def describe_bisection(found: Bisection, of: str) -> Document:
    """All of it.

    Args:
        found: the bisection.
        of: what was measured, in words.
    """
    conclusion = Span(text=found.conclusion, tone="bad" if found.found else "warning")
    lines = [say(conclusion, indented=False)]
    if found.culprit is not None and found.before is not None and found.ratio is not None:
        ends = "" if found.low is None or found.high is None else f" [{found.low:.3f}, {found.high:.3f}]"
        share = "" if found.share is None else f", {100 * found.share:.0f} % of the whole effect"
        lines.append(say(f"{found.culprit.label} over {found.before.label}: {found.ratio:.3f}{ends}{share}"))
        lines.append(say(f"{of}; the interval is of both comparisons with the good end together"))
    table = Table(heads=_LOOKS, rows=tuple(map(_look, found.looks)), blank_line_before=True)
    return (*lines, table)


def _look(look: Look) -> Row:
    ratio = write_ratio(look.comparison)
    reason = look.comparison.reason if look.side == "not measured" else ""
    return Row(
        cells=(
            Cell(text=look.label),
            ratio,
            Cell(text=str(look.comparison.replicates or "–")),
            Cell(text=look.side, detail=reason),
        )
    )
