"""The claims of a study and what became of them, with what was changed from the original and what the run holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.records.metrics import METRICS
from harness.records.units import format_interval, format_ratio
from harness.stats import Share
from harness.verdicts.claims import ClaimResult, ClaimsReport, Judgement, PartResult

_COLOURS: dict[Judgement, str] = {
    "supported": "green",
    "refuted": "red",
    "inconclusive": "yellow",
    "not judged": "magenta",
}
_WIDTHS = {"claim": 36, "the original said": 26, "estimate": 24, "verdict": None, "reason": None}
"""The widest that a column grows; what is left is for the reasons."""
_LEGEND = (
    "estimate: a ratio with its 95 % interval, corrected for nothing. verdict: all differences asserted in this run "
    "together are wrong in at most 5 % of runs (Holm); each equality in at most 5 % (two one-sided tests)."
)


def print_claims(report: ClaimsReport, console: Console) -> None:
    """All that is said of a run's claims."""
    console.print(f"[bold]{escape(report.title)}[/bold]")
    console.print(f"  {escape(_held(report))}")
    print_verdicts(report, console)
    _print_lists(console, {"Differs from the study as written": report.deviations, "Notes": report.notes})
    if not report.valid:
        console.print(f"\n[bold red]{escape(_invalid(report))}[/bold red]")


def print_verdicts(report: ClaimsReport, console: Console) -> None:
    """The claims with what they rest on; what a run's own report says already is left out."""
    table = _table(report)
    table.title, table.title_justify, table.title_style = "Claims", "left", "bold"
    console.print()
    console.print(table)
    console.print(f"  [dim]{escape(_LEGEND)}[/dim]")
    control = "Control (the reference measured twice)"
    _print_lists(console, {control: tuple(_controls(report)), "Length of the answers": tuple(_answers(report))})


def _print_lists(console: Console, lists: Mapping[str, Sequence[str]]) -> None:
    for title, lines in lists.items():
        if lines:
            console.print(f"\n[bold]{title}[/bold]")
        for line in lines:
            console.print(f"  {escape(line)}")


def _held(report: ClaimsReport) -> str:
    """How much of the run there is."""
    plural = "" if report.replicates == 1 else "s"
    counted = ", ".join(f"{count} {status}" for status, count in report.trials.items())
    state = "" if report.status == "complete" else f"; the run is {report.status!r}, so this is what it holds so far"
    return f"run {report.run}: {report.replicates} replicate{plural}; trials: {counted}{state}"


def _table(report: ClaimsReport) -> Table:
    table = Table()
    for head, width in _WIDTHS.items():
        table.add_column(head, overflow="fold", max_width=width)
    for claim in report.claims:
        for row in _rows(claim):
            table.add_row(*row)
        table.add_section()
    return table


def _rows(claim: ClaimResult) -> Iterator[tuple[str, str, str, str, str]]:
    """A row of the claim; where it has several parts, a row of each below it."""
    head = f"[bold]{escape(claim.id)}[/bold]  {escape(claim.says)}"
    if len(claim.parts) == 1:
        (part,) = claim.parts
        yield head, escape(claim.original), _estimate(part), _verdict(claim.verdict), escape(part.reason)
        return
    yield head, escape(claim.original), "", _verdict(claim.verdict), ""
    for part in claim.parts:
        yield f"  {part.rule}", "", _estimate(part), _verdict(part.verdict), escape(part.reason)


def _estimate(part: PartResult) -> str:
    if part.ratio is None:
        return "–"
    return escape(f"{part.about}\n{format_ratio(part.ratio, part.low, part.high)}")


def _verdict(verdict: Judgement) -> str:
    return f"[{_COLOURS[verdict]}]{verdict}[/{_COLOURS[verdict]}]"


def _controls(report: ClaimsReport) -> Iterator[str]:
    for name, control in report.control.items():
        said = "not measured"
        if control is not None:
            said = f"{format_ratio(control.ratio, control.low, control.high)} {control.verdict}"
        yield f"{METRICS[name].title}: {said}"


def _answers(report: ClaimsReport) -> Iterator[str]:
    """The shares, in words; nothing where no answers were measured."""
    for share, of in ((report.answers.requests, "requests"), (report.answers.variants, "variants' means")):
        if share is not None:
            yield (
                f"the number of tokens explains {_share(share)} of the variance of request time between {of} "
                f"({share.replicates} replicates, {share.points} points)"
            )


def _share(share: Share) -> str:
    low, high = (None if end is None else 100 * end for end in (share.low, share.high))
    return f"{format_interval(100 * share.value, low, high, '1')} %"


def _invalid(report: ClaimsReport) -> str:
    if not report.replicates:
        return "No trial of this run is ok: there is nothing to judge by. See the report of the run."
    return "A control failed: the reference differs from itself, so quieten the machine and measure again."
