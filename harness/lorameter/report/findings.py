"""What a profile found: what was seen, what it costs, what to try."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from lorameter.profile.finding import Finding
from lorameter.records.metrics import METRICS
from lorameter.records.units import format_bytes, format_value
from lorameter.report.blocks import Cell, ColumnHeader, Table, say_each, write_bytes, write_row


def tabulate_findings(findings: Sequence[Finding], notes: Iterable[str]) -> Table:
    """A row a finding; `notes` stand below."""
    rows = [write_row(one.code, one.message, _cost(one), _remedy(one)) for one in findings]
    seen, cost = ColumnHeader(text="seen"), ColumnHeader(text="cost", right=True)
    return Table(
        title="Findings, and what was seen to hang on each",
        heads=(ColumnHeader(text="finding"), seen, cost, ColumnHeader(text="what to try")),
        rows=tuple(rows or [write_row("none", "", "", "")]),
        notes=say_each(notes),
        blank_line_before=True,
    )


def say_unfound(codes: Iterable[str], findings: Sequence[Finding], not_observable: Collection[str]) -> Iterator[str]:
    """What else was looked for, and what could not be: those of `not_observable`."""
    rest = [code for code in codes if code not in {finding.code for finding in findings}]
    unseen = [code for code in rest if code in not_observable]
    yield f"looked for and not found: {', '.join(code for code in rest if code not in unseen)}"
    if unseen:
        yield f"not judged, since it is not known what ran: {', '.join(unseen)}"


def _cost(finding: Finding) -> Cell:
    if finding.cost_s is None or finding.cost_share is None:
        return write_bytes(finding.cost_bytes or 0)
    of = "" if finding.metric == "step_time_s" else f" of {METRICS[finding.metric].title}"
    said = f"{format_value(finding.cost_s, 's')}\n{finding.cost_share:.1%}{of}"
    held = "" if finding.cost_bytes is None else f"\n{format_bytes(finding.cost_bytes)}"
    return Cell(text=said + held, value=finding.cost_s, unit="s")


def _remedy(finding: Finding) -> Cell:
    if not finding.suggestion:
        return Cell(text=finding.remedy, detail=f"Cannot be tried here: {finding.obstacle}.")
    return Cell(text=finding.remedy, command=f"--try {finding.code}")
