"""Streams a Kineto/Chrome trace into compact columns.

A trace of a few steps has hundreds of megabytes, nearly all of it arguments that nothing here reads. ijson hands out
one event at a time (yajl in C, some 70 MB a second), and what is kept of an event is some forty bytes: numbers in
arrays, names once. The columns of one million events take as much memory as the libraries that read them.

Numbers come as ``int`` of any size and as ``Decimal``. ijson's ``use_float`` would read a tenth faster, but then yajl
converts integers itself and refuses a file with one beyond 64 bits signed, as hashes and addresses may be.
"""

from __future__ import annotations

import csv
import math
import re
import sys
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

import ijson

from kernels_check.trace.file import EXPECTED, JsonLimits, TraceError, TraceFile

_GPU = frozenset({"kernel", "gpu_memcpy", "gpu_memset", "memcpy", "memset"})
_LAUNCHES = frozenset({"cuda_runtime", "cuda_driver", "runtime", "driver"})
_OPERATORS = frozenset({"cpu_op", "operator"})
_STEP = re.compile(r"^ProfilerStep#(\d{1,18})$")
NO_CORRELATION = -1


@dataclass(slots=True)
class Events:
    """Columns of equal length; times in microseconds, durations NaN where the event has no usable one."""

    name: array[int] = field(default_factory=lambda: array("l"))
    """Index into ``names``."""
    start_us: array[float] = field(default_factory=lambda: array("d"))
    duration_us: array[float] = field(default_factory=lambda: array("d"))
    lane: array[int] = field(default_factory=lambda: array("l"))
    """Index into ``lanes``: device and stream, or process and thread."""
    correlation: array[int] = field(default_factory=lambda: array("q"))
    names: list[str] = field(default_factory=list)
    lanes: list[tuple[str, str]] = field(default_factory=list)
    _name_index: dict[str, int] = field(default_factory=dict)
    _lane_index: dict[tuple[str, str], int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.name)

    def add(self, name: str, lane: tuple[str, str], start_us: float, duration_us: float, correlation: int) -> None:
        """Append one event."""
        name_index = self._name_index.setdefault(name, len(self.names))
        if name_index == len(self.names):
            self.names.append(name)
        lane_index = self._lane_index.setdefault(lane, len(self.lanes))
        if lane_index == len(self.lanes):
            self.lanes.append(lane)
        self.name.append(name_index)
        self.lane.append(lane_index)
        self.start_us.append(start_us)
        self.duration_us.append(duration_us)
        self.correlation.append(correlation)


@dataclass(slots=True)
class Kineto:
    """What is kept of one trace."""

    events: int = 0
    gpu: Events = field(default_factory=Events)
    """Kernels, copies and fills on devices; never annotations."""
    operators: Events = field(default_factory=Events)
    """Operators on the host."""
    launch_correlation: array[int] = field(default_factory=lambda: array("q"))
    launch_us: array[float] = field(default_factory=lambda: array("d"))
    """When the host launched what carries this correlation on the GPU."""
    host_steps: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Start and end of each ProfilerStep on the host."""
    gpu_steps: dict[int, tuple[float, float]] = field(default_factory=dict)
    """The same on the GPU, where Kineto recorded annotations there."""
    not_complete: int = 0
    """GPU events that are not of phase X, so without a duration."""


def read_kineto(recording: TraceFile) -> Kineto:
    """Read every event of the trace.

    Raises:
        TraceError: no JSON, JSON that ends early, no trace events in it, or something that no recorder writes.
    """
    kept = Kineto()
    prefix = "item" if recording.head().lstrip()[:1] == b"[" else "traceEvents.item"
    try:
        with _integers_of_any_length():
            for event in ijson.items(_Bounded(recording, kept), prefix):
                kept.events += 1
                if isinstance(event, dict):
                    _keep(event, kept)
    except (ijson.JSONError, ArithmeticError) as error:  # the latter of an exponent that no Decimal holds
        raise TraceError(_broken(recording, kept, error)) from None
    if kept.events == 0:
        raise TraceError(
            f"{recording.path}: is JSON, but holds no trace events ({recording.progress} read, the list traceEvents is "
            f"missing or empty); expected {EXPECTED}. Pass what torch.profiler's export_chrome_trace() wrote"
        )
    return kept


class _Bounded:
    """The recording as ijson reads it, each part held against the limits before it is parsed."""

    def __init__(self, recording: TraceFile, kept: Kineto) -> None:
        self._recording = recording
        self._kept = kept
        self._limits = JsonLimits()

    def read(self, size: int = -1) -> bytes:
        """Next bytes, empty at the end."""
        part = self._recording.read(size)
        problem = self._limits.problem(part)
        if problem is not None:
            raise TraceError(
                f"{self._recording.path}: is no trace: {problem}, after {self._kept.events:,} events and "
                f"{self._recording.progress}; expected {EXPECTED}. Pass what torch.profiler's export_chrome_trace() "
                "wrote"
            )
        return part


@contextmanager
def _integers_of_any_length() -> Iterator[None]:
    """Lift Python's limit on digits: ijson 3.6 does not check that yajl's integer was converted, and crashes."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(limit)


def _broken(recording: TraceFile, kept: Kineto, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    early = "parse error: premature EOF" in reason or "ncomplete" in reason
    what = "the JSON ends early: the file was cut off" if early else f"the JSON is corrupt ({reason})"
    return (
        f"{recording.path}: {what}, after {kept.events:,} events and {recording.progress}. Copy or export it again; "
        "nothing of a damaged file is reported"
    )


def _keep(event: dict[str, Any], kept: Kineto) -> None:
    category, name = event.get("cat"), event.get("name")
    if not isinstance(category, str) or not isinstance(name, str):
        return
    category = category.lower()
    if category in _GPU:
        if event.get("ph") == "X":
            _keep_gpu(event, name, kept)
        else:
            kept.not_complete += 1
    elif category in _OPERATORS:
        if event.get("ph") == "X":
            lane = (str(event.get("pid")), str(event.get("tid")))
            kept.operators.add(name, lane, _number(event.get("ts")), _duration(event), NO_CORRELATION)
    elif category in _LAUNCHES:
        correlation, start = _correlation(event), _number(event.get("ts"))
        if correlation != NO_CORRELATION and math.isfinite(start):
            kept.launch_correlation.append(correlation)
            kept.launch_us.append(start)
    elif step := _STEP.match(name):
        _keep_step(event, int(step.group(1)), kept.gpu_steps if category.startswith("gpu") else kept.host_steps)


def _keep_gpu(event: dict[str, Any], name: str, kept: Kineto) -> None:
    arguments = _arguments(event)
    lane = (str(arguments.get("device", event.get("pid"))), str(arguments.get("stream", event.get("tid"))))
    kept.gpu.add(name, lane, _number(event.get("ts")), _duration(event), _correlation(event))


def _keep_step(event: dict[str, Any], number: int, steps: dict[int, tuple[float, float]]) -> None:
    start, duration = _number(event.get("ts")), _duration(event)
    if math.isfinite(start + duration):
        first, last = steps.get(number, (start, start + duration))
        steps[number] = (min(first, start), max(last, start + duration))


def _arguments(event: dict[str, Any]) -> dict[str, Any]:
    arguments = event.get("args")
    return arguments if isinstance(arguments, dict) else {}


def _correlation(event: dict[str, Any]) -> int:
    value = _arguments(event).get("correlation")
    usable = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    return value if usable else NO_CORRELATION  # type: ignore[return-value]


def _duration(event: dict[str, Any]) -> float:
    duration = _number(event.get("dur"))
    return duration if duration >= 0.0 else math.nan


def _number(value: object) -> float:
    """A finite number, also one written as a string; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | SupportsFloat):
        return math.nan
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


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
