"""The runs of a folder as a document: the state, verdict and size of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorameter.report.blocks import Cell, Document, Row, Section, Table, name_columns, say_each, write_bytes, write_row


def describe_runs(rows: Sequence[Mapping[str, Any]]) -> Document:
    """A row for each run, and below the table the reasons for unreadable runs.

    Args:
        rows: the rows of `lorameter list runs --json`.
    """
    damaged = say_each(f"{row['run']}: {row['title']}" for row in rows if row["status"] == "damaged")
    table = Table(heads=name_columns("run", "study", "state", "verdict", "size", left=4), rows=tuple(map(_row, rows)))
    return (table, Section(title="Not read", lines=damaged)) if damaged else (table,)


def _row(row: Mapping[str, Any]) -> Row:
    size = write_bytes(row["size_bytes"])
    if row["status"] == "damaged":
        return write_row(row["run"], "", "damaged", "", size)
    ok, planned = row["trials"].get("ok", 0), sum(row["trials"].values())
    short = "" if ok == planned else f", {ok or 'none'} of {planned} trials ok"
    verdict = Cell(verdict=row["verdict"], detail="baseline" if row["baseline"] else "")
    return write_row(row["run"], row["study"], f"{row['status']}{short}", verdict, size)
