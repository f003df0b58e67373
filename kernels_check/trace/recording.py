"""Reads recordings of other tools: a trace of torch.profiler (Kineto, Chrome), or a kernel table of nsys.

A trace is in memory only once, and unneeded fields of events are not decoded. A damaged file is refused, since nothing
is known about the missing part.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from kernels_check.trace.events import Events, NameTotal, Row, make_events

EXPECTED = "a Kineto/Chrome trace (.json, .json.gz) or an nsys cuda_gpu_kern_sum table (.csv, .csv.gz)"
UNPACKED_FREELY_BYTES = 256 << 20
MAX_EXPANSION = 100
"""Maximum ratio of unpacked to packed size: traces reach about twenty; other gzip files may reach a thousand."""
_TRACE = re.compile(rb"\s*(\{|\[\s*(\{|\]|$))")
"""Start of a JSON document; nsys output starts with its progress, such as ``[3/8] Executing``."""
NO_CORRELATION = -1


class TraceError(ValueError):
    """Raised for a file that cannot be judged; the message says why and what to do."""


def read_bytes(path: Path) -> bytes:
    """The content of the file, unpacked and without a byte order mark.

    Raises:
        TraceError: the file is missing, empty or damaged, or its unpacked size is too large for a recording.
    """
    if not path.is_file():  # a pipe may never end
        raise TraceError(f"{path}: there is no such file; expected {EXPECTED}")
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            packed, most = len(content), max(UNPACKED_FREELY_BYTES, MAX_EXPANSION * len(content))
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(most + 1)
            if len(content) > most:
                raise TraceError(
                    f"{path}: {packed:,} bytes unpack to more than {most:,}, over {MAX_EXPANSION} times as many: no "
                    f"recording is that empty; expected {EXPECTED}. If it is one, unpack it and pass the unpacked file"
                )
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise TraceError(f"{path}: the gzip stream is damaged ({error}). Copy or export it again") from None
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror or error}") from error
    content = content.removeprefix(b"\xef\xbb\xbf")
    if not content.strip():
        raise TraceError(f"{path}: the file is empty; expected {EXPECTED}. Record it again")
    return content


def is_trace(content: bytes) -> bool:
    """Whether the content is JSON; other content is read as a table."""
    return _TRACE.match(content) is not None


# --- traces -----------------------------------------------------------------------------------------------------------

_GPU = ("kernel", "gpu_memcpy", "gpu_memset", "memcpy", "memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver", "runtime", "driver")
_OPERATORS = ("cpu_op", "operator")
_STEP = re.compile(r"ProfilerStep#(\d{1,18})")
Interval = tuple[float, float]


class _Event(msgspec.Struct):
    """One event. Fields accept any value, because tools rewrite traces."""

    name: Any = None
    cat: Any = None
    ph: Any = None
    ts: Any = None
    dur: Any = None
    pid: Any = None
    tid: Any = None
    args: Any = None


class _Document(msgspec.Struct):
    traceEvents: list[msgspec.Raw] = []  # noqa: N815 name used by the recorder


_decode_document = msgspec.json.Decoder(_Document | list[msgspec.Raw]).decode
_decode_event = msgspec.json.Decoder(_Event).decode


@dataclass(frozen=True)
class Kineto:
    """The events of a trace that are judged; times in microseconds."""

    gpu: Events
    """Kernels, copies and fills on devices; never annotations."""
    operators: Events
    """Operators on the CPU."""
    launches: dict[int, float]
    """Time of the launch on the CPU, by correlation id."""
    host_steps: dict[int, Interval]
    """Start and end of each ProfilerStep on the host."""
    gpu_steps: dict[int, Interval]
    """Start and end of each ProfilerStep on the GPU, if Kineto recorded annotations there."""


def read_kineto(path: Path, content: bytes) -> Kineto:
    """Read every complete event of the trace.

    Raises:
        TraceError: the file is not JSON, is truncated, or has no GPU or operator events.
    """
    gpu: list[Row] = []
    operators: list[Row] = []
    launches: dict[int, float] = {}
    host_steps: dict[int, Interval] = {}
    gpu_steps: dict[int, Interval] = {}
    for event in _complete_events(path, content):
        category, start, duration = event.cat.lower(), _number(event.ts), _number(event.dur)
        arguments = event.args if isinstance(event.args, dict) else {}
        correlation = arguments.get("correlation")
        if not isinstance(correlation, int) or not 0 <= correlation < 2**63:
            correlation = NO_CORRELATION
        if category in _GPU:
            lane = str(arguments.get("device", event.pid)), str(arguments.get("stream", event.tid))
            gpu.append((event.name, lane, start, duration, correlation))
        elif category in _OPERATORS:
            operators.append((event.name, (str(event.pid), str(event.tid)), start, duration, NO_CORRELATION))
        elif category in _LAUNCHES and correlation != NO_CORRELATION:
            launches[correlation] = start
        elif (step := _STEP.fullmatch(event.name)) and math.isfinite(start + duration):
            steps = gpu_steps if category.startswith("gpu") else host_steps
            first, last = steps.get(int(step[1]), (math.inf, -math.inf))
            steps[int(step[1])] = min(first, start), max(last, start + duration)
    if not gpu and not operators:
        raise TraceError(
            f"{path}: is JSON, but has no event of a GPU kernel or an operator: another program's trace? Record with "
            "torch.profiler and activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], and pass what "
            "export_chrome_trace() wrote"
        )
    return Kineto(make_events(gpu), make_events(operators), launches, host_steps, gpu_steps)


def _complete_events(path: Path, content: bytes) -> Iterator[_Event]:
    """Events of phase X, which have a duration, with a name and a category."""
    try:
        document = _decode_document(content)
        for raw in document.traceEvents if isinstance(document, _Document) else document:
            event = _decode_event(raw)
            if event.ph == "X" and isinstance(event.name, str) and isinstance(event.cat, str):
                yield event
    except (msgspec.DecodeError, RecursionError) as error:
        what = "the JSON ends early: the file was cut off" if "truncated" in str(error) else f"is not a trace: {error}"
        raise TraceError(
            f"{path}: {what}; expected {EXPECTED}. Copy or export it again; no part of a damaged file is reported"
        ) from None


def _number(value: Any) -> float:
    """A number, also one written as a string; NaN for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


# --- tables -----------------------------------------------------------------------------------------------------------

_TOTAL = re.compile(r"Total Time \((ns|us|μs|µs|ms|s|sec)\)")
_UNITS_MS = {"ns": 1e-6, "us": 1e-3, "μs": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3, "sec": 1e3}
_ROUNDING_PERCENT = 0.05
"""Maximum rounding error of an entry in the column ``Time (%)``, which has one decimal."""
_TABLES = {"kernels": ("Instances", "Name"), "memory operations": ("Count", "Operation")}
"""The column headings of the count and the name, for each table that is read."""


def read_nsys(path: Path, content: bytes) -> list[NameTotal]:
    """Rows of the first kernel table, and of the first table of memory operations if there is one.

    Raises:
        TraceError: there is no kernel table, a row is damaged, or rows are missing.
    """
    found: dict[str, list[NameTotal]] = {}
    heading: list[str] = []
    rows: list[list[str]] = []
    try:
        lines = [*csv.reader(io.StringIO(content.decode(), newline=""), strict=True), []]
    except (csv.Error, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: is neither JSON nor CSV ({error}); expected {EXPECTED}. Export it again") from None
    if b"\0" in content:
        raise TraceError(f"{path}: is binary; expected {EXPECTED}. Export it again")
    for line in lines:
        cells = [cell.strip() for cell in line]
        if cells and re.match(r"-?\d", cells[0]):
            rows.append(cells)
            continue
        for table, names in _TABLES.items():
            if rows and table not in found and {*names} <= {*heading} and any(map(_TOTAL.fullmatch, heading)):
                found[table] = _read_table(path, heading, rows, *names)
        heading, rows = cells, []
    if "kernels" not in found:
        raise TraceError(
            f"{path}: is no JSON and has no table of kernels (its heading has Total Time, Instances and Name); "
            f"expected {EXPECTED}. nsys writes it with `nsys stats --report cuda_gpu_kern_sum --format csv "
            "RECORDING`; where it says SKIPPED, no kernel was recorded"
        )
    return [total for table in found.values() for total in table]


def _read_table(
    path: Path, heading: Sequence[str], rows: Sequence[Sequence[str]], calls: str, name: str
) -> list[NameTotal]:
    time, unit = next((cell, match[1]) for cell in heading if (match := _TOTAL.fullmatch(cell)))
    percent = next((cell for cell in heading if re.fullmatch(r"Time ?\(%\)", cell)), None)
    totals, share = [], 0.0
    for row in rows:
        try:
            cells = dict(zip(heading, row, strict=True))
            total = NameTotal(name=cells[name], calls=int(cells[calls]), time_ms=float(cells[time]) * _UNITS_MS[unit])
            share += float(cells[percent]) if percent is not None else 0.0
        except ValueError as error:
            raise TraceError(f"{path}: the row {row} is damaged ({error}). Export the table again") from None
        if total.calls < 1 or not 0.0 <= total.time_ms < math.inf or not total.name:
            raise TraceError(f"{path}: the row {row} has no name, calls or time. Export the table again")
        totals.append(total)
    if percent is not None and share < 100.0 - _ROUNDING_PERCENT * (len(rows) + 1):
        raise TraceError(
            f"{path}: {len(rows)} rows add up to {share:.1f} % of their time: rows are missing, the shares would be "
            "wrong. Export the whole table again"
        )
    return totals
