"""Describes the claims of a study and their verdicts, the deviations from the original, and the contents of the run."""

from __future__ import annotations

from collections.abc import Iterator

from lorameter.records.metrics import METRICS
from lorameter.records.units import format_count, format_interval
from lorameter.report.blocks import (
    Cell,
    ColumnHeader,
    Document,
    Row,
    Section,
    Span,
    Table,
    collapse_constant_columns,
    list_sections,
    make_invalid_lines,
    to_line,
    to_lines,
    value_cell,
    write_row,
)
from lorameter.report.phrases import format_verdict
from lorameter.verdicts.claims import ClaimResult, ClaimsReport, PartResult

_HEADS = (
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
    rows = tuple(row for claim in report.claims for row in _rows(claim))
    legend = Span(text="95 % intervals of each ratio alone; differences by Holm, equalities by TOST", tone="faint")
    table = Table(title="Claims", heads=_HEADS, rows=rows, notes=(to_line(legend),))
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
                "Length of the answers": tuple(_answers(report)),
                "Proof (what kernels_check saw)": [
                    f"{one.path}: {one.found} ({one.reason})" for one in (engine.proof if engine else ())
                ],
                "Differences other than the engine": engine.differs if engine else (),
                "Sources": sources,
            }
        ),
    )


def _rows(claim: ClaimResult) -> Iterator[Row]:
    """A row for the claim and, if it has several parts, a row for each part below it."""
    head, verdict, several = Cell(name=claim.id, text=claim.says), Cell(verdict=claim.verdict), len(claim.parts) > 1
    about, ratio = ("", "") if several else (claim.parts[0].about, _ratio(claim.parts[0]))
    yield write_row(head, about, ratio, verdict, claim.original, ends_group=not several)
    for part in claim.parts if several else ():
        verdict = Cell(verdict=part.verdict)
        last = part is claim.parts[-1]
        yield write_row(f"  {part.rule}", part.about, _ratio(part), verdict, "", ends_group=last)


def _ratio(part: PartResult) -> Cell:
    return Cell(text="–") if part.ratio is None else value_cell(part.ratio, part.low, part.high, "1")


def _answers(report: ClaimsReport) -> Iterator[str]:
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
