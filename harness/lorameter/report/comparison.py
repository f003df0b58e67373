"""Describes verdicts: a comparison of two sides and reports based on one (the gate, an A/B, a bisection), and claims.

An inconclusive verdict is shown as a sentence, an invalid one with its reason; the statistics of all verdicts are
collapsed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from lorameter.measurements.metrics import METRICS, PHASE_TITLES, is_difference_metric
from lorameter.records.store import Run
from lorameter.records.units import first_few, format_count, format_interval
from lorameter.report.blocks import (
    Block,
    Cell,
    Collapsible,
    ColumnHeader,
    Document,
    Figure,
    Line,
    Row,
    Section,
    Span,
    Table,
    collapse_constant_columns,
    list_sections,
    make_invalid_lines,
    name_columns,
    to_line,
    to_lines,
    value_cell,
    verdict_tone,
    write_number,
    write_ratio,
    write_row,
)
from lorameter.report.figures import draw_ratios
from lorameter.report.phrases import (
    describe_notices,
    explain_inconclusive,
    format_effect,
    format_verdict,
    metric_title,
    ratio_title,
    verdict_cell,
)
from lorameter.run.bisect import Bisection
from lorameter.verdicts.ab import Attribution
from lorameter.verdicts.claims import ClaimResult, ClaimsReport, PartResult
from lorameter.verdicts.compare import EXIT_OF, PRECEDENCE, ComparisonReport, ComparisonRow
from lorameter.verdicts.gate import GateResult
from lorameter.verdicts.series import is_memory

MAX_NAMED = 3
"""Maximum comparisons that are named if several have the same reason."""
MAX_FINDINGS = 6
"""Maximum findings that are not collapsed; the table has them all."""
MAX_PACKAGES = 12
"""Maximum packages that are listed; a separate interpreter can differ in hundreds."""
_RATIO = ColumnHeader(text="candidate / base", right=True, ratio=True)
_HEADS = (
    *name_columns("variant", "metric", left=2),
    _RATIO,
    ColumnHeader(text="verdict"),
    ColumnHeader(text="tolerance", right=True, drop_priority=7, collapse_if_constant=True),
    ColumnHeader(text="replicates", right=True, drop_priority=6, collapse_if_constant=True),
)


def describe_comparison(report: ComparisonReport) -> Document:
    """The findings, the table with the controls, and other differences."""
    lines = tuple(_findings(report))
    more = lines[MAX_FINDINGS:]
    collapsed = Collapsible(summary=to_line(Span(text=f"and {len(more)} more findings", tone="faint")), lines=more)
    return (
        *make_invalid_lines(report.why_invalid),
        Section(title=comparison_title(report), lines=lines[:MAX_FINDINGS]),
        *([collapsed] if more else []),
        _tabulate(report),
        *_statistics(report),
        *list_sections({"Differing": [str(one) for one in report.differing]}),
        *describe_notices(report.notices),
    )


def comparison_title(report: ComparisonReport) -> str:
    """The candidate and its base."""
    return f"{report.candidate} against {report.base}"


def _findings(report: ComparisonReport) -> Iterator[Line]:
    """The verdicts other than "equivalent", the worst first, without repeated reasons."""
    rows = sorted(
        (one for one in report.comparisons if one.verdict != "equivalent"),
        key=lambda one: PRECEDENCE.index(EXIT_OF[one.verdict]),
    )
    grouped: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        grouped.setdefault((row.verdict, _reason(row)), []).append(_name(row))
    for (verdict, reason), names in grouped.items():
        word = Span(text=verdict.replace("_", " "), tone=verdict_tone(verdict))
        yield to_line(f"{first_few(names, MAX_NAMED, '; ')}: ", word, reason)
    if report.comparisons and not rows:
        yield to_line(Span(text="equivalent", tone="note"), ", each within its margin")


def _reason(row: ComparisonRow) -> str:
    if row.verdict == "invalid":  # the first line has the reasons
        return ""
    if row.verdict == "inconclusive":
        return f": {explain_inconclusive(row, row.metric, row.interleaving)}"
    if row.verdict in ("regressed", "improved"):
        return f", {''.join(format_effect(row, row.metric))}"
    return f": {row.reason}"


def _name(row: ComparisonRow) -> str:
    return f"{row.name}, {metric_title(row.metric)}"


def _tolerance(row: ComparisonRow) -> Cell:
    in_unit = is_difference_metric(row.metric)
    text = f"{row.tolerance:.3g} {METRICS[row.metric].unit}" if in_unit else f"{100 * row.tolerance:.3g} %"
    return Cell(text=text, value=row.tolerance)


def _tabulate(report: ComparisonReport) -> Table:
    """A row for each comparison; below it the controls."""
    rows = (
        write_row(
            one.name,
            ratio_title(one.metric),
            write_ratio_or_peak(one),
            verdict_cell(one, one.metric, "sides", one),
            _tolerance(one),
            write_number(one.replicates or None),
        )
        for one in report.comparisons
    )
    notes = [to_line(f"control of {phase}: {format_verdict(control)}") for phase, control in report.control.items()]
    peaks = to_line(Span(text="peaks: the largest of the candidate over the largest of the base", tone="faint"))
    notes += [peaks] if any(is_memory(one.metric) for one in report.comparisons) else []
    return collapse_constant_columns(Table(heads=_HEADS, rows=tuple(rows), notes=tuple(notes)))


def write_ratio_or_peak(row: ComparisonRow) -> Cell:
    """The ratio; for peaks without an interval, since the ratio of two maxima has none."""
    is_peak = is_memory(row.metric) and row.ratio is not None
    return write_number(row.ratio, ".4g") if is_peak else write_ratio(row)


def _statistics(report: ComparisonReport) -> Iterator[Block]:
    reasons: dict[str, list[str]] = {}
    for row in report.comparisons:
        if row.verdict != "invalid":
            reasons.setdefault(row.reason, []).append(_name(row))
    if reasons:
        count = f"{len(report.comparisons)} verdicts rest" if len(report.comparisons) > 1 else "the verdict rests"
        lines = to_lines(f"{first_few(names, MAX_NAMED, '; ')}: {reason}" for reason, names in reasons.items())
        yield Section(title="Statistics")
        yield Collapsible(summary=to_line(Span(text=f"what {count} on", tone="faint")), lines=lines)


def describe_attribution(attribution: Attribution, run: Run) -> Document:
    """Facts of the run, differing packages, and the ratio of each part of the work with its interval."""
    facts = tuple(to_line(text, label=label) for label, text in _sides(attribution, run))
    rows = (write_row(part.variant, ratio_title(part.metric), write_ratio(part)) for part in attribution.parts)
    title = "Where the time went (intervals not corrected for several parts)"
    heads = (*name_columns("variant", "part", left=2), _RATIO)
    return Section(title="Sides", lines=facts), Table(title=title, heads=heads, rows=tuple(rows))


def _sides(attribution: Attribution, run: Run) -> Iterator[tuple[str, str]]:
    for name in ("base", "candidate"):
        side = run.manifest.sides[name]
        yield name, f"{side['label']}, harness {side['worker']}"
    yield "level", f"{run.manifest.interleaving}: {run.manifest.why}"
    if run.manifest.stopped:
        yield "stopped", run.manifest.stopped
    packages = [
        f"{name} {base or 'not installed'} → {candidate or 'not installed'}"
        for name, (base, candidate) in attribution.packages.items()
    ]
    if packages:
        yield "packages", first_few(packages, MAX_PACKAGES)
    yield from (("differs", str(one)) for one in attribution.differing)


def describe_gate(result: GateResult) -> Document:
    """Whether the gate passes and why, then the comparison."""
    first = make_invalid_lines(result.report.why_invalid)
    outcome = Section(
        title=describe_outcome(result),
        tone="good" if result.passed else "bad",
        lines=tuple(to_line(Span(text=line, tone="bad")) for line in result.unmet),
        last=not first,
    )
    return (*first, outcome, *describe_comparison(result.report)[len(first) :])


def describe_outcome(result: GateResult) -> str:
    """Whether the gate passes, with its exit code and the number of verdicts of each kind."""
    counts = Counter(row.verdict for row in result.report.comparisons)
    counted = ", ".join(f"{count} {verdict.replace('_', ' ')}" for verdict, count in counts.items())
    passed = "passed" if result.passed else "failed"
    return f"Gate {passed} (exit {result.exit_code}): {counted or 'nothing compared'}"


def draw_comparison_figures(report: ComparisonReport) -> tuple[Figure, ...]:
    """A figure for each phase; ratios that could not be computed are left out."""
    by_phase: dict[str, dict[str, ComparisonRow]] = {}
    for one in report.comparisons:
        title = PHASE_TITLES[METRICS[one.metric].phase] if one.metric in METRICS else "Others"
        by_phase.setdefault(title, {})[f"{one.name}, {ratio_title(one.metric)}"] = one
    caption = (
        "A dot is the candidate's value as a multiple of the base's, the line through it its interval; right of 1 is "
        "worse."
    )
    about = "candidate / base; right of 1 is worse"
    figures = (draw_ratios(f"{title}: candidate / base", caption, about, found) for title, found in by_phase.items())
    return tuple(figure for figure in figures if figure is not None)


def describe_bisection(bisection: Bisection, of: str) -> Document:
    """The conclusion, and a row for each comparison with the good end; `of` names the measured quantity."""
    rows = (
        write_row(
            look.label,
            write_ratio(look.comparison),
            write_number(look.comparison.replicates or None),
            Cell(text=look.side, detail=look.comparison.reason if look.side == "not measured" else ""),
        )
        for look in bisection.looks
    )
    heads = name_columns("compared with the good end", "ratio", "replicates", "is")
    return *_conclusion(bisection, of), Table(heads=heads, rows=tuple(rows))


def _conclusion(bisection: Bisection, of: str) -> Iterator[Line]:
    yield to_line(Span(text=bisection.conclusion, tone="bad" if bisection.found else "warning"), indented=False)
    if bisection.culprit is not None and bisection.before is not None and bisection.ratio is not None:
        ends = (
            "" if bisection.low is None or bisection.high is None else f" [{bisection.low:.3f}, {bisection.high:.3f}]"
        )
        share = "" if bisection.share is None else f", {100 * bisection.share:.0f} % of the whole effect"
        yield to_line(f"{bisection.culprit.label} over {bisection.before.label}: {bisection.ratio:.3f}{ends}{share}")
        yield to_line(f"{of}; the interval is of both comparisons with the good end together")


# --- claims -----------------------------------------------------------------------------------------------------------

_CLAIM_HEADS = (
    ColumnHeader(text="claim"),
    ColumnHeader(text="of", drop_priority=7),
    ColumnHeader(text="ratio", right=True, ratio=True),
    ColumnHeader(text="verdict"),
    ColumnHeader(text="the original said", drop_priority=6),
)


def describe_claims(report: ClaimsReport) -> Document:
    """All verdicts on the claims of a run, with their reasons."""
    counted = ", ".join(f"{count} {status}" for status, count in report.trials.items())
    state = "" if report.status == "complete" else f"; the run is {report.status!r}, so these are its trials so far"
    summary = f"run {report.run}: {format_count(report.replicates, 'replicate')}; trials: {counted}{state}"
    return (
        *make_invalid_lines(report.invalid),
        Section(title=report.title, lines=to_lines([summary])),
        *describe_verdicts(report),
        *list_sections(
            {
                "Machine and versions": _describe_machine(report),
                "Differs from the study as written": report.deviations,
                "Notes": report.notes,
            }
        ),
    )


def describe_verdicts(report: ClaimsReport) -> Document:
    """The claims with their reasons, without the facts that the run's report already contains."""
    rows = tuple(row for claim in report.claims for row in _claim_rows(claim))
    legend = Span(text="95 % intervals of each ratio alone; differences by Holm, equalities by TOST", tone="faint")
    table = Table(title="Claims", heads=_CLAIM_HEADS, rows=rows, notes=(to_line(legend),))
    controls = [f"{METRICS[name].title}: {format_verdict(one, name)}" for name, one in report.control.items()]
    reasons = tuple(
        to_line(part.reason, label=claim.id if len(claim.parts) == 1 else f"{claim.id} {part.rule}")
        for claim in report.claims
        for part in claim.parts
    )
    engine = report.engine
    sources = [
        f"{', '.join(claim.id for claim in report.claims if claim.source == page)}: {page}"
        for page in dict.fromkeys(claim.source for claim in report.claims if claim.source)
    ]
    return (
        collapse_constant_columns(table),
        Section(title="Reasons", lines=reasons),
        *list_sections(
            {
                "Control (the reference measured twice)": controls,
                "Length of the answers": tuple(_explain_answers(report)),
                "Proof (what kernels_check saw)": [
                    f"{one.path}: {one.found} ({one.reason})" for one in (engine.proof if engine else ())
                ],
                "Differences other than the engine": engine.differs if engine else (),
                "Sources": sources,
            }
        ),
    )


def _claim_rows(claim: ClaimResult) -> Iterator[Row]:
    """A row for the claim and, if it has several parts, a row for each part below it."""
    head, verdict, several = Cell(name=claim.id, text=claim.says), Cell(verdict=claim.verdict), len(claim.parts) > 1
    about, ratio = ("", "") if several else (claim.parts[0].about, _part_ratio(claim.parts[0]))
    yield write_row(head, about, ratio, verdict, claim.original, ends_group=not several)
    for part in claim.parts if several else ():
        cells = (f"  {part.rule}", part.about, _part_ratio(part), Cell(verdict=part.verdict), "")
        yield write_row(*cells, ends_group=part is claim.parts[-1])


def _part_ratio(part: PartResult) -> Cell:
    return Cell(text="–") if part.ratio is None else value_cell(part.ratio, part.low, part.high, "1")


def _explain_answers(report: ClaimsReport) -> Iterator[str]:
    """The shares as text; nothing if no answers were measured."""
    for share, of in ((report.answers.requests, "requests"), (report.answers.variants, "variants' means")):
        if share is not None:
            low, high = (None if end is None else 100 * end for end in (share.low, share.high))
            yield (
                f"the number of tokens explains {format_interval(100 * share.value, low, high, '1')} % of the variance "
                f"of request time between {of} ({format_count(share.replicates, 'replicate')}, "
                f"{format_count(share.points, 'point')})"
            )


def _describe_machine(report: ClaimsReport) -> list[str]:
    """The machine and the versions with which an engine was tested; a run's own report has them at its top."""
    engine = report.engine
    if engine is None:
        return []
    versions = ", ".join(f"{name} {version}" for name, version in engine.versions.items() if version)
    return [engine.machine, versions, *(f"{name}: {command}" for name, command in engine.commands.items())]
