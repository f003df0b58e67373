"""A comparison for people and for machines: one view, rendered as a rich table, as Markdown, and as GitHub annotations.

Every format shows the same rows with the same digits, worst verdict first where a format cuts off (GitHub shows ten
annotations of a level and step), and the reason of everything that is not a pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.records.metrics import METRICS
from harness.records.units import format_ratio
from harness.stats import Comparison, Verdict
from harness.verdicts.outcome import EXIT_OF, PRECEDENCE, Compared, ComparisonReport

if TYPE_CHECKING:
    from rich.console import Console

    from harness.records.store import Run
    from harness.verdicts.ab import Attribution
    from harness.verdicts.gate import GateResult


HEADS = ("variant", "metric", "candidate / base", "verdict", "tolerance", "replicates", "reason")
_COLOURS: dict[Verdict, str] = {
    "regressed": "red",
    "improved": "green",
    "equivalent": "cyan",
    "inconclusive": "yellow",
    "invalid": "bold red",
    "no_baseline": "magenta",
    "not_comparable": "magenta",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRow:
    """One comparison as text."""

    variant: str
    metric: str
    ratio: str
    verdict: Verdict
    tolerance: str
    replicates: str
    reason: str

    @property
    def cells(self) -> tuple[str, ...]:
        """In the order of `HEADS`."""
        return (self.variant, self.metric, self.ratio, self.verdict, self.tolerance, self.replicates, self.reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonView:
    """What every format shows."""

    title: str
    rows: tuple[ComparisonRow, ...]
    controls: tuple[str, ...]
    differing: tuple[str, ...]
    notices: tuple[str, ...]


def view_of_comparison(report: ComparisonReport) -> ComparisonView:
    """The view of a comparison."""
    return ComparisonView(
        title=f"{report.candidate} against {report.base}",
        rows=tuple(
            ComparisonRow(
                variant=compared.variant,
                metric=METRICS[compared.metric].title if compared.metric in METRICS else compared.metric,
                ratio=_shown_ratio(compared),
                verdict=compared.verdict,
                tolerance=f"{100 * compared.tolerance:.3g} %",
                replicates=_replicates(compared.comparison),
                reason=compared.comparison.reason,
            )
            for compared in report.comparisons
        ),
        controls=tuple(
            f"control of {phase}: " + ("not measured" if control is None else f"{_ratio(control)} {control.verdict}")
            for phase, control in report.control.items()
        ),
        differing=tuple(map(str, report.differing)),
        notices=tuple(f"{notice.code}: {notice.message} {notice.remedy}" for notice in report.notices),
    )


def print_comparison(report: ComparisonReport, console: Console) -> None:
    """The comparison as a table with its reasons below, so that a narrow terminal cuts nothing."""
    from rich.markup import escape
    from rich.table import Table

    view = view_of_comparison(report)
    console.print(f"[bold]{escape(view.title)}[/bold]")
    table = Table()
    for index, head in enumerate(HEADS[:-1]):
        table.add_column(head, justify="left" if index < 2 else "right", overflow="fold")
    for row in view.rows:
        colour = _COLOURS[row.verdict]
        cells = [escape(cell) for cell in row.cells[:-1]]
        cells[3] = f"[{colour}]{row.verdict}[/{colour}]"
        table.add_row(*cells)
    console.print(table)
    for line in view.controls:
        console.print(f"  {escape(line)}")
    reasons: dict[str, list[str]] = {}
    for row in view.rows:
        reasons.setdefault(row.reason, []).append(f"{row.variant}, {row.metric}")
    for reason, names in reasons.items():
        shown = "; ".join(names[:3]) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")
        console.print(f"  {escape(shown)}: [dim]{escape(reason)}[/dim]")
    for title, lines in (("Differing", view.differing), ("Notices", view.notices)):
        if lines:
            console.print(f"\n[bold]{title}[/bold]")
        for line in lines:
            console.print(f"  {escape(line)}")


def print_gate(result: GateResult, console: Console) -> None:
    """The comparison and what the gate made of it."""
    from rich.markup import escape

    print_comparison(result.report, console)
    for line in result.unmet:
        console.print(f"  [red]{escape(line)}[/red]")
    colour = "green" if result.passed else "red"
    console.print(f"\n[bold {colour}]{_outcome(result)}[/bold {colour}]")


def gate_markdown(result: GateResult) -> str:
    """The gate as Markdown, for the summary of a CI job."""
    view = view_of_comparison(result.report)
    lines = [f"### {_outcome(result)}", "", _cell(view.title), ""]
    if view.rows:
        lines += [_row(HEADS), _row(["---"] * len(HEADS))]
        lines += [_row([_cell(cell) for cell in row.cells]) for row in view.rows]
        lines.append("")
    for line in (*result.unmet, *view.controls, *view.differing, *view.notices):
        lines.append(f"- {_cell(line)}")
    return "\n".join(lines).rstrip() + "\n"


def gate_annotations(result: GateResult) -> str:
    """The gate as GitHub workflow commands: an error for what fails, a warning for what the policy lets pass."""
    view = view_of_comparison(result.report)
    found: list[tuple[int, str]] = []
    for row in view.rows:
        code = EXIT_OF[row.verdict]
        if code:
            passes = row.verdict == "inconclusive" and result.policy.inconclusive == "pass"
            ratio = f"{row.ratio}, " if row.ratio != "–" else ""
            title = f"lorameter: {row.variant}, {row.metric} {row.verdict}"
            found.append(
                (PRECEDENCE.index(code), annotation("warning" if passes else "error", title, f"{ratio}{row.reason}"))
            )
    lines = [line for _, line in sorted(found, key=lambda item: item[0])]
    lines += [annotation("error", "lorameter: policy", line) for line in result.unmet]
    lines += [annotation("warning", "lorameter: differing", line) for line in view.differing]
    level = "notice" if result.passed else "error"
    return "\n".join([annotation(level, "lorameter gate", f"{_outcome(result)}: {view.title}"), *lines]) + "\n"


def annotation(level: str, title: str, message: str) -> str:
    """One workflow command; what would end its title or its line early is escaped."""
    for character, escaped in (("%", "%25"), ("\r", "%0D"), ("\n", "%0A")):
        title, message = title.replace(character, escaped), message.replace(character, escaped)
    title = title.replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={title}::{message}"


def _outcome(result: GateResult) -> str:
    counts: dict[str, int] = {}
    for compared in result.report.comparisons:
        counts[compared.verdict] = counts.get(compared.verdict, 0) + 1
    counted = ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or "nothing compared"
    return f"Gate {'passed' if result.passed else 'failed'} (exit {result.exit_code}): {counted}"


def _shown_ratio(compared: Compared) -> str:
    """The ratio; of peaks without a bracket, since the largest against the largest has no interval."""
    ratio = compared.comparison.ratio
    if compared.metric.endswith("_bytes") and ratio is not None:
        return f"{ratio:.4g} (largest)"
    return _ratio(compared.comparison)


def _ratio(comparison: Comparison) -> str:
    return format_ratio(comparison.ratio, comparison.low, comparison.high)


def _replicates(comparison: Comparison) -> str:
    """How many, and for an open question how many would settle it."""
    if not comparison.replicates:
        return "–"
    needed = comparison.replicates_needed if comparison.verdict == "inconclusive" else None
    return f"{comparison.replicates} of {needed}" if needed else str(comparison.replicates)


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Text that ends no cell and starts no markup."""
    for character in ("\\", "|", "*", "_", "`", "<", "["):
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


MOST_PACKAGES = 12
"""Packages that are listed; an interpreter of its own differs in hundreds."""


def print_attribution(attribution: Attribution, run: Run, console: Console) -> None:
    """Facts of the run, differing packages, and the ratio of each part of the work with its interval."""
    from rich.markup import escape
    from rich.table import Table

    sides = run.manifest.sides
    for side in ("base", "candidate"):
        console.print(f"  {side:<10}{escape(str(sides[side]['label']))}, harness {escape(str(sides[side]['worker']))}")
    console.print(f"  {'level':<10}{run.manifest.interleaving}: {escape(run.manifest.why)}")
    if run.manifest.stopped:
        console.print(f"  {'stopped':<10}{escape(run.manifest.stopped)}")
    names = list(attribution.packages)
    for name in names[:MOST_PACKAGES]:
        base, candidate = attribution.packages[name]
        console.print(f"  {'package':<10}{escape(name)}: {base or 'not installed'} → {candidate or 'not installed'}")
    if len(names) > MOST_PACKAGES:
        console.print(f"  {'package':<10}and {len(names) - MOST_PACKAGES} more")
    for difference in attribution.differing:
        console.print(f"  {'differs':<10}{escape(str(difference))}")
    table = Table(title="Where the time went (one by one, not corrected for looking at all)", title_justify="left")
    for head in ("variant", "part", "× base"):
        table.add_column(head, justify="right" if head == "× base" else "left")
    for part in attribution.parts:
        comparison = part.comparison
        ratio = format_ratio(comparison.ratio, comparison.low, comparison.high)
        table.add_row(escape(part.variant), METRICS[part.metric].title, escape(ratio))
    console.print(table)
