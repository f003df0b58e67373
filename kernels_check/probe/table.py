"""The probe's table."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kernels_check.probe.result import Exactness, PathReport, Speed
from kernels_check.terminal import escape_control_chars

_MARKS = {
    "exact": "[green]ran, exact[/]",
    "inexact": "[red]ran, INEXACT[/]",
    "claimed": "[red]CLAIMED, did not run[/]",
    "broken": "[red]PROBE FAILED[/]",
    "unavailable": "[yellow]cannot run[/]",
}
_LONGEST_REASON = 240


def show(reports: Sequence[PathReport], machine: Mapping[str, Any]) -> None:
    """Print one row a path: verdict, evidence or reason, its worst comparison, and its speed."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    table = Table(box=box.SIMPLE_HEAD, show_lines=False)
    table.add_column("path", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("evidence, or why not", overflow="fold", ratio=3)
    table.add_column("worst error", overflow="fold", ratio=2)
    table.add_column("speed [quartiles]", overflow="fold", ratio=2)
    for report in reports:
        words = escape(escape_control_chars((report.reason or report.evidence or "")[:_LONGEST_REASON]))
        table.add_row(report.name, _MARKS[report.status], words, _worst(report.exactness), escape(_speed(report.speed)))
    console = Console(width=None if sys.stdout.isatty() else 150)
    said = f"{machine['device']} ({machine['name']}, {machine['cpu_capability']}), 1 thread; {versions}"
    console.print(escape(escape_control_chars(said)))
    console.print(table)
    wrong = [report.name for report in reports if report.failed]
    ran = sum(report.ran for report in reports)
    verdict = f"wrong: {', '.join(wrong)}" if wrong else "each that ran agrees with its reference"
    console.print(f"{ran} of {len(reports)} paths ran; {verdict}", highlight=False)


def _worst(exactness: Sequence[Exactness]) -> str:
    if not exactness:
        return ""
    worst = max(exactness, key=lambda comparison: comparison.strain)
    relation = "≤" if worst.error <= worst.bound else ">"
    window = f"{worst.least:.3g} ≤ " if worst.least else ""
    return f"{worst.what}: {window}{worst.error:.3g} {relation} {worst.bound:.3g}"


def _speed(speed: Speed | None) -> str:
    if speed is None:
        return ""
    return f"{speed.speedup:.2f} [{speed.low:.2f}, {speed.high:.2f}] times as fast as {speed.plain}"
