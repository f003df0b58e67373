"""Reads the table that ``nsys stats --report cuda_gpu_kern_sum --format csv`` prints.

The table comes between lines of progress, possibly with other tables. Columns are found by name, because their number
differs between versions of nsys; a time carries its unit in the heading. Only sums are known: no interval, no step.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kernels_check.trace.file import EXPECTED, TraceError, TraceFile

_TOTAL = re.compile(r"^Total Time \((ns|us|μs|µs|ms|s|sec)\)$")
_UNITS_MS = {"ns": 1e-6, "us": 1e-3, "μs": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3, "sec": 1e3}
_ROUNDING_PERCENT = 0.05
"""Largest error of one entry of the column ``Time (%)``, which has one decimal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTotal:
    """All launches of one name."""

    name: str
    calls: int
    time_ms: float


@dataclass(frozen=True, slots=True)
class _Heading:
    width: int
    name: int
    calls: int
    time: int
    unit_ms: float
    percent: int | None
    table: str


def read_nsys(recording: TraceFile) -> tuple[list[KernelTotal], list[str]]:
    """Rows of the first kernel table, and of the first table of memory operations where there is one; and notices.

    Raises:
        TraceError: no kernel table, a damaged row, or a table that was cut off.
    """
    rows = _rows(recording)
    totals: list[KernelTotal] = []
    notices: list[str] = []
    seen: set[str] = set()
    columns: _Heading | None = None
    percent = 0.0
    in_table = 0
    for number, row in rows:
        heading = _heading(row)
        if heading is None and columns is not None and _is_row(row):
            if columns.table in seen:
                continue
            total, part = _total(recording, number, row, columns)
            totals.append(total)
            percent += part
            in_table += 1
            continue
        if columns is not None:
            _end(recording, columns, in_table, percent, seen, notices)
        columns, percent, in_table = heading, 0.0, 0
    if columns is not None:
        _end(recording, columns, in_table, percent, seen, notices)
    if "kernels" not in seen:
        raise TraceError(
            f"{recording.path}: no table of kernels in {recording.progress} of text (its heading has Total Time, "
            f"Instances and Name); expected {EXPECTED}. nsys writes it with `nsys stats --report "
            "cuda_gpu_kern_sum --format csv RECORDING`; where it says SKIPPED, no kernel was recorded"
        )
    return totals, notices


def _rows(recording: TraceFile) -> Iterator[tuple[int, list[str]]]:
    text = recording.text()
    reader = csv.reader(_counted(recording, text), strict=True)
    try:
        for row in reader:
            yield reader.line_num, [cell.strip() for cell in row]
    except csv.Error as error:
        raise TraceError(
            f"{recording.path}: line {reader.line_num} is no CSV ({error}): the file was cut off, edited, or is "
            f"something else; expected {EXPECTED}. Export it again"
        ) from None


def _counted(recording: TraceFile, lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        recording.bytes_read += len(line)
        yield line


def _heading(row: Sequence[str]) -> _Heading | None:
    """Where the heading of a table names what is needed: kernels have instances, memory operations a count."""
    time = next((index for index, cell in enumerate(row) if _TOTAL.match(cell)), None)
    for table, calls, name in (("kernels", "Instances", "Name"), ("memory", "Count", "Operation")):
        if time is not None and calls in row and name in row:
            match = _TOTAL.match(row[time])
            assert match is not None
            percent = next((index for index, cell in enumerate(row) if re.fullmatch(r"Time ?\(%\)", cell)), None)
            return _Heading(
                len(row), row.index(name), row.index(calls), time, _UNITS_MS[match.group(1)], percent, table
            )
    return None


def _is_row(row: Sequence[str]) -> bool:
    """A table's row begins with a number; progress, blank lines and other headings do not."""
    return bool(row) and bool(re.match(r"^-?\d", row[0]))


def _total(recording: TraceFile, number: int, row: Sequence[str], columns: _Heading) -> tuple[KernelTotal, float]:
    if len(row) != columns.width:
        raise TraceError(
            f"{recording.path}: line {number} has {len(row)} of {columns.width} columns: the table was cut off or "
            "edited. Export it again"
        )
    try:
        calls, time = int(row[columns.calls]), float(row[columns.time])
        percent = float(row[columns.percent]) if columns.percent is not None else 0.0
    except ValueError:
        calls, time, percent = -1, -1.0, 0.0
    if calls < 1 or not 0.0 <= time < float("inf") or not row[columns.name]:
        raise TraceError(
            f"{recording.path}: line {number}: {row[columns.name]!r} has {row[columns.calls]!r} instances in "
            f"{row[columns.time]!r}; expected numbers above zero. Export the table again"
        )
    return KernelTotal(name=row[columns.name], calls=calls, time_ms=time * columns.unit_ms), percent


def _end(
    recording: TraceFile, columns: _Heading, rows: int, percent: float, seen: set[str], notices: list[str]
) -> None:
    """Close a table: its percentages add up to 100, unless rows are missing."""
    if columns.table in seen:
        notices.append(f"a second table of {columns.table} was left out: only the first of a file counts")
        return
    if rows == 0:
        return
    seen.add(columns.table)
    if columns.percent is not None and percent < 100.0 - _ROUNDING_PERCENT * (rows + 1):
        raise TraceError(
            f"{recording.path}: the {rows} rows of {columns.table} add up to {percent:.1f} % of their time: rows are "
            "missing, the shares would be wrong. Export the whole table again"
        )
