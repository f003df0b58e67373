"""The runs of a folder as a document: the state, findings and size of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorameter.records.units import format_bytes
from lorameter.report.blocks import Cell, Document, Row, Section, Table, name_columns, say

HEADS = name_columns("run", "study", "state", "verdict", "size", left=4)


def describe_runs(rows: Sequence[Mapping[str, Any]]) -> Document:
    """A row a run; below them why any cannot be read.

    Args:
        rows: as `lorameter list runs --json` has them.
    """
    damaged = [row for row in rows if row["status"] == "damaged"]
    table = Table(heads=HEADS, rows=tuple(map(_row, rows)))
    lines = tuple(say(f"{row['run']}: {row['title']}") for row in damaged)
    return (table, Section(title="Not read", lines=lines)) if damaged else (table,)


def _row(row: Mapping[str, Any]) -> Row:
    size = Cell(text=format_bytes(row["size_bytes"]), value=float(row["size_bytes"]), unit="byte")
    if row["status"] == "damaged":
        return Row(cells=(Cell(text=row["run"]), Cell(), Cell(text="damaged"), Cell(), size))
    trials: Mapping[str, int] = row["trials"]
    ok, all_of_them = trials.get("ok", 0), sum(trials.values())
    short = "" if ok == all_of_them else f", {ok or 'none'} of {all_of_them} trials ok"
    accepted = "baseline" if row["baseline"] else ""
    return Row(
        cells=(
            Cell(text=row["run"]),
            Cell(text=row["study"]),
            Cell(text=f"{row['status']}{short}"),
            Cell(verdict=row["verdict"], detail=accepted),
            size,
        )
    )
