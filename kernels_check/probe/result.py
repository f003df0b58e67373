"""What the probe says of one fast path: could it run, did it, how exact, how fast, and why not.

A path counts as run only by what was executed or stored; that it was accepted without complaint proves nothing. What
was accepted, did not run and was not announced by any warning is ``claimed``, the one case that misleads a user.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kernels_check.terminal import escape_control_chars

ProbeStatus: TypeAlias = Literal["exact", "inexact", "claimed", "unavailable", "broken"]
"""``exact``: ran, within its bounds. ``inexact``: ran, outside. ``claimed``: accepted in silence, and did not run.
``unavailable``: refused, by an exception or a warning. ``broken``: the probe's own code raised, which says nothing of
the path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exactness:
    """One comparison with a reference."""

    what: str
    error: float
    bound: float
    source: str
    """Where the bound comes from."""
    least: float = 0.0
    """Errors below it are as wrong: an error of quantisation identifies its format."""

    @property
    def holds(self) -> bool:
        """False for NaN."""
        return self.least <= self.error <= self.bound

    @property
    def strain(self) -> float:
        """Error as a part of what is allowed; infinite where it does not hold."""
        return self.error / self.bound if self.holds else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Paired repeats of the path and of the plain one."""

    plain: str
    """Name of the plain path."""
    path_time_s: float
    """Median."""
    plain_time_s: float
    """Median."""
    speedup: float
    """Median of the paired ratios, plain divided by path: above 1 is faster."""
    low: float
    """First quartile of the ratios."""
    high: float
    """Third quartile."""
    repeats: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What one try of a path brought."""

    ran: bool
    evidence: str
    """The operators, kernels or stored bytes that prove it, or that were there instead."""
    exactness: tuple[Exactness, ...] = ()
    speed: Speed | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PathReport:
    """One line of the probe."""

    name: str
    can_run: bool
    """Whether nothing refused it."""
    ran: bool
    status: ProbeStatus
    evidence: str | None
    exactness: tuple[Exactness, ...]
    speed: Speed | None
    reason: str | None
    """Why it does not run, in the library's own words where it gave any."""

    @property
    def failed(self) -> bool:
        """Whether it misleads: wrong numbers, a claim that is none, or a probe that failed."""
        return self.status in ("inexact", "claimed", "broken")


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
