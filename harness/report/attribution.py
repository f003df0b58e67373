"""What an A/B effect can be laid to: what differs between the sides, and which part of the work moved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.records.units import METRICS, format_ratio

if TYPE_CHECKING:
    from rich.console import Console

    from harness.records.store import Run
    from harness.verdicts.ab import Attribution

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
