"""What an A/B's effect is laid to: the facts of the run, what differs between its sides, and where the time went."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lorameter.report.blocks import ColumnHeader, Document, Section, Table, say, write_ratio, write_row
from lorameter.report.phrases import title_of_ratio

if TYPE_CHECKING:
    from lorameter.records.store import Run
    from lorameter.verdicts.ab import Attribution

MOST_PACKAGES = 12
"""Packages that are listed; an interpreter of its own differs in hundreds."""


def describe_attribution(attribution: Attribution, run: Run) -> Document:
    """Facts of the run, differing packages, and the ratio of each part of the work with its interval."""
    facts = (*_sides(run), *_packages(attribution), *(("differs", str(one)) for one in attribution.differing))
    table = Table(
        title="Where the time went (one by one, not corrected for looking at all)",
        heads=(
            ColumnHeader(text="variant"),
            ColumnHeader(text="part"),
            ColumnHeader(text="candidate / base", right=True, ratio=True),
        ),
        rows=tuple(
            write_row(part.variant, title_of_ratio(part.metric), write_ratio(part)) for part in attribution.parts
        ),
        blank_line_before=True,
    )
    return (Section(title="Sides", lines=tuple(say(said, label=name) for name, said in facts)), table)


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
