"""What the doctor found, as a rich table: what can run, what can be measured, what would spoil it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.machine.doctor.check import About, Check, Standing

TITLES: dict[About, str] = {
    "runs": "What this machine can run",
    "measures": "What it can measure",
    "spoils": "What would spoil a measurement here",
}
_COLOURS: dict[Standing, str] = {"good": "green", "note": "cyan", "bad": "yellow", "unfit": "bold red"}


def print_diagnosis(checks: Sequence[Check], console: Console, *, fit: bool) -> None:
    """A table for each of the three questions, and the answer in one line."""
    for about, title in TITLES.items():
        table = Table(title=title, title_justify="left", title_style="bold")
        for head in ("", "", "found", "remedy"):
            table.add_column(head, overflow="fold")
        for check in (check for check in checks if check.about == about):
            colour = _COLOURS[check.standing]
            table.add_row(
                escape(check.name),
                f"[{colour}]{check.standing}[/{colour}]",
                escape(check.found),
                f"[dim]{escape(check.remedy)}[/dim]",
            )
        console.print(table)
    counts = Counter(check.standing for check in checks)
    said = ", ".join(f"{counts[standing]} {standing}" for standing in _COLOURS if counts[standing])
    verdict = "[green]fit to measure[/green]" if fit else "[bold red]unfit[/bold red]: what it measured would not count"
    console.print(f"This machine is {verdict}. Checks: {said}.")
