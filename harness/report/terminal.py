"""A run as rich tables: on a terminal in colour, piped as plain and complete text."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.records.record import Notice
from harness.records.units import format_ratio
from harness.report.view import PhaseTable, RunView
from harness.stats import Comparison

PIPED_WIDTH = 200
"""Nothing may be cut where there is no terminal whose width one could ask."""

_COLOURS = {"regressed": "red", "improved": "green", "equivalent": "cyan", "inconclusive": "yellow"}


def console_for(file: object | None = None, *, stderr: bool = False) -> Console:
    """A console that knows whether it is a terminal; without one it is wide, plain and complete."""
    console = Console(file=file, stderr=stderr, highlight=False)  # type: ignore[arg-type]
    if not console.is_terminal:
        console = Console(file=file, stderr=stderr, highlight=False, width=PIPED_WIDTH, no_color=True)  # type: ignore[arg-type]
    return console


def print_run(view: RunView, console: Console) -> None:
    """All of a run's report."""
    console.print(f"[bold]{escape(view.title)}[/bold]")
    for fact in view.facts:
        console.print(f"  {escape(fact)}")
    for head, lines in (("Differs from the study as written", view.deviations), ("Notes", view.notes)):
        if lines:
            console.print(f"\n[bold]{head}[/bold]")
        for line in lines:
            console.print(f"  {escape(line)}")
    for table in view.tables:
        console.print()
        console.print(_rich_table(table))
        console.print(_control_line(table))
        if table.note:
            console.print(f"  {escape(table.note)}")
    if view.failures:
        console.print("\n[bold red]Trials without a result[/bold red]")
        for failure in view.failures:
            console.print(f"  {escape(failure)}")
    print_notices(view.notices, console)
    counted = ", ".join(f"{count} {status}" for status, count in view.counts.items()) or "none yet"
    console.print(f"\nTrials: {counted}. Run {view.run} in {escape(view.path)}")
    if view.state != "complete":
        console.print(f"[bold red]This run is not complete[/bold red] ({view.state}): what is shown is what there is.")
    elif not view.valid:
        console.print("[bold red]This run is invalid:[/bold red] see the notices and trials above.")


def print_notices(notices: tuple[Notice, ...], console: Console) -> None:
    """Notices, each with its remedy."""
    if notices:
        console.print("\n[bold]Notices[/bold]")
    for notice in notices:
        console.print(f"  [yellow]{notice.code}[/yellow]  {escape(notice.message)} [dim]{escape(notice.remedy)}[/dim]")


def _rich_table(view: PhaseTable) -> Table:
    table = Table(title=view.title, title_justify="left", title_style="bold", caption_justify="left")
    for index, head in enumerate(view.heads):
        table.add_column(escape(head), justify="left" if index == 0 else "right", overflow="fold")
    for row in view.rows:
        cells = [_two_lines(escape(cell)) for cell in row.cells]
        if row.ratio is not None:
            colour = _COLOURS.get(row.ratio.verdict, "magenta")
            verdict = row.ratio.verdict
            cells[2] = f"{_two_lines(escape(_ratio(row.ratio)))}\n[{colour}]{verdict}[/{colour}]"
        table.add_row(*cells, style="bold" if row.reference else "")
    return table


def _two_lines(cell: str) -> str:
    """`value unit` above `[low, high]`, so that many columns fit a terminal."""
    value, bracket, rest = cell.partition(" \\[")
    if not bracket:
        value, bracket, rest = cell.partition(" [")
    return f"{value}\n[dim]\\[{rest}[/dim]" if bracket else cell


def _ratio(comparison: Comparison) -> str:
    return format_ratio(comparison.ratio, comparison.low, comparison.high)


def _control_line(view: PhaseTable) -> str:
    if view.control is None:
        return "  control: not measured"
    return (
        f"  control (the reference measured twice): {escape(_ratio(view.control))} {view.control.verdict}; "
        f"[dim]{escape(view.control.reason)}[/dim]"
    )
