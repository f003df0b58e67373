"""A bisection as a document: what was found first, then every comparison, in the order in which they were made."""

from __future__ import annotations

from lorameter.report.blocks import Cell, Document, Row, Span, Table, name_columns, say, write_ratio
from lorameter.run.bisect import Bisection, Look

HEADS = name_columns("compared with the good end", "ratio", "replicates", "is")


def describe_bisection(found: Bisection, of: str) -> Document:
    """All of it.

    Args:
        found: the bisection.
        of: what was measured, in words.
    """
    conclusion = Span(text=found.conclusion, tone="bad" if found.found else "warning")
    lines = [say(conclusion, indented=False)]
    if found.culprit is not None and found.before is not None and found.ratio is not None:
        ends = "" if found.low is None or found.high is None else f" [{found.low:.3f}, {found.high:.3f}]"
        share = "" if found.share is None else f", {100 * found.share:.0f} % of the whole effect"
        lines.append(say(f"{found.culprit.label} over {found.before.label}: {found.ratio:.3f}{ends}{share}"))
        lines.append(say(f"{of}; the interval is of both comparisons with the good end together"))
    table = Table(heads=HEADS, rows=tuple(map(_row, found.looks)), blank_line_before=True)
    return (*lines, table)


def _row(look: Look) -> Row:
    ratio = write_ratio(look.comparison)
    reason = look.comparison.reason if look.side == "not measured" else ""
    return Row(
        cells=(
            Cell(text=look.label),
            ratio,
            Cell(text=str(look.comparison.replicates or "–")),
            Cell(text=look.side, detail=reason),
        )
    )
