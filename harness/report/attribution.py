"""What an A/B's effect is laid to: the facts of the run, what differs between its sides, and where the time went."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from harness.records.metrics import METRICS
from harness.report.table import Document, Table, name_columns, say_each, write_ratio, write_row

if TYPE_CHECKING:
    from harness.records.store import Run
    from harness.verdicts.ab import Attribution

MOST_PACKAGES = 12
"""Packages that are listed; an interpreter of its own differs in hundreds."""


def describe_attribution(attribution: Attribution, run: Run) -> Document:
    """Facts of the run, differing packages, and the ratio of each part of the work with its interval."""
    table = Table(
        title="Where the time went (one by one, not corrected for looking at all)",
        heads=name_columns("variant", "part", "× base", left=2),
        rows=tuple(
            write_row(part.variant, METRICS[part.metric].title, write_ratio(part.comparison))
            for part in attribution.parts
        ),
    )
    facts = (*_sides(run), *_packages(attribution), *(("differs", str(one)) for one in attribution.differing))
    return (*say_each(f"{name:<10}{said}" for name, said in facts), table)


def _sides(run: Run) -> Iterator[tuple[str, str]]:
    for name in ("base", "candidate"):
        side = run.manifest.sides[name]
        yield name, f"{side['label']}, harness {side['worker']}"
    yield "level", f"{run.manifest.interleaving}: {run.manifest.why}"
    if run.manifest.stopped:
        yield "stopped", run.manifest.stopped


def _packages(attribution: Attribution) -> Iterator[tuple[str, str]]:
    names = list(attribution.packages)
    for name in names[:MOST_PACKAGES]:
        base, candidate = attribution.packages[name]
        yield "package", f"{name}: {base or 'not installed'} → {candidate or 'not installed'}"
    if len(names) > MOST_PACKAGES:
        yield "package", f"and {len(names) - MOST_PACKAGES} more"
