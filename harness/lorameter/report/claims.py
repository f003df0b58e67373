"""The claims of a study and what became of them, with what was changed from the original and what the run holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from lorameter.records.metrics import METRICS
from lorameter.records.units import format_count, format_interval
from lorameter.report.blocks import (
    Cell,
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
    say_each,
    say_invalid,
    value_cell,
    write_ratio,
    write_row,
)
from lorameter.report.phrases import verdict_cell
from lorameter.stats import ShareEstimate
from lorameter.verdicts.claims import ClaimResult, ClaimsReport, PartResult
from lorameter.verdicts.compare import MARGIN

_HEADS = (
    ColumnHeader(text="claim"),
    ColumnHeader(text="of", drop_priority=3),
    ColumnHeader(text="ratio", right=True, ratio=True),
    ColumnHeader(text="verdict"),
    ColumnHeader(text="the original said", drop_priority=2),
)
_LEGEND = (
    "ratio: with its 95 % interval, corrected for nothing. verdict: all differences asserted in this run "
    "together are wrong in at most 5 % of runs (Holm); each equality in at most 5 % (two one-sided tests)."
)


def describe_claims(report: ClaimsReport) -> Document:
    """All that is said of a run's claims."""
    return (
        *say_invalid(report.invalid),
        Section(title=report.title, lines=say_each([_held(report)]), blank_line_before=False),
        *describe_verdicts(report),
        *list_sections({"Machine and versions": tuple(_place(report))}),
        *list_sections({"Differs from the study as written": report.deviations, "Notes": report.notes}),
    )


def describe_verdicts(report: ClaimsReport) -> Document:
    """The claims with what they rest on; what a run's own report says already is left out."""
    rows = tuple(row for claim in report.claims for row in _rows(claim))
    legend = say(Span(text=_LEGEND, tone="faint"))
    control = "Control (the reference measured twice)"
    return (
        collapse_constant_columns(
            Table(title="Claims", heads=_HEADS, rows=rows, notes=(legend,), blank_line_before=True)
        ),
        Section(title="Reasons", lines=tuple(_reasons(report))),
        *list_sections({control: tuple(_controls(report)), "Length of the answers": tuple(_answers(report))}),
        *list_sections(
            {
                "Proof (what kernels_check saw)": tuple(_proof(report)),
                "Differs apart from the engine": report.engine.differs if report.engine else (),
                "Sources": tuple(_sources(report)),
            }
        ),
    )


def _held(report: ClaimsReport) -> str:
    """How much of the run there is."""
    counted = ", ".join(f"{count} {status}" for status, count in report.trials.items())
    state = "" if report.status == "complete" else f"; the run is {report.status!r}, so this is what it holds so far"
    return f"run {report.run}: {format_count(report.replicates, 'replicate')}; trials: {counted}{state}"


def _rows(claim: ClaimResult) -> tuple[Row, ...]:
    """A row of the claim; where it has several parts, a row of each below it."""
    head, verdict = Cell(name=claim.id, text=claim.says), Cell(verdict=claim.verdict)
    if len(claim.parts) == 1:
        (part,) = claim.parts
        rows = [write_row(head, part.about, _estimate(part), verdict, claim.original)]
    else:
        rows = [write_row(head, "", "", verdict, claim.original)]
        for part in claim.parts:
            rows.append(write_row(f"  {part.rule}", part.about, _estimate(part), Cell(verdict=part.verdict), ""))
    *others, last = rows
    return (*others, dataclasses.replace(last, ends_group=True))


def _estimate(part: PartResult) -> Cell:
    return Cell(text="–") if part.ratio is None else value_cell(part.ratio, part.low, part.high, "1")


def _reasons(report: ClaimsReport) -> Iterator[Line]:
    """Why each part came out as it did."""
    for claim in report.claims:
        for part in claim.parts:
            yield say(part.reason, label=claim.id if len(claim.parts) == 1 else f"{claim.id} {part.rule}")


def _controls(report: ClaimsReport) -> Iterator[str]:
    for name, control in report.control.items():
        said = "not measured"
        if control is not None:
            found = verdict_cell(control, name, MARGIN, "variants")
            said = f"{write_ratio(control).line} {found.said or found.verdict}"
        yield f"{METRICS[name].title}: {said}"


def _answers(report: ClaimsReport) -> Iterator[str]:
    """The shares, in words; nothing where no answers were measured."""
    for share, of in ((report.answers.requests, "requests"), (report.answers.variants, "variants' means")):
        if share is not None:
            yield (
                f"the number of tokens explains {_share(share)} of the variance of request time between {of} "
                f"({format_count(share.replicates, 'replicate')}, {format_count(share.points, 'point')})"
            )


def _proof(report: ClaimsReport) -> Iterator[str]:
    """A line for each path that must show that the engine ran in its variant and there alone."""
    for one in report.engine.proof if report.engine else ():
        yield f"{one.path}: {one.found} ({one.reason})"


def _sources(report: ClaimsReport) -> Iterator[str]:
    """Each page once, with the claims that it makes."""
    pages: dict[str, list[str]] = {}
    for claim in report.claims:
        if claim.source:
            pages.setdefault(claim.source, []).append(claim.id)
    for page, ids in pages.items():
        yield f"{', '.join(ids)}: {page}"


def _place(report: ClaimsReport) -> Iterator[str]:
    """Where an engine was tried, and with what; a run's own report says so at its head."""
    if report.engine is None:
        return
    yield report.engine.machine
    yield ", ".join(f"{name} {version}" for name, version in report.engine.versions.items() if version)
    for name, command in report.engine.commands.items():
        yield f"{name}: {command}"


def _share(share: ShareEstimate) -> str:
    low, high = (None if end is None else 100 * end for end in (share.low, share.high))
    return f"{format_interval(100 * share.value, low, high, '1')} %"
