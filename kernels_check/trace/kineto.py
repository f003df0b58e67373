"""Streams a Kineto/Chrome trace into compact columns.

A trace of a few steps has hundreds of megabytes, nearly all of it arguments that nothing here reads. ijson hands out
one event at a time (yajl in C, some 70 MB a second), and what is kept of an event is some forty bytes: numbers in
arrays, names once. The columns of one million events take as much memory as the libraries that read them.

Numbers come as ``int`` of any size and as ``Decimal``. ijson's ``use_float`` would read a tenth faster, but then yajl
converts integers itself and refuses a file with one beyond 64 bits signed, as hashes and addresses may be.
"""

from __future__ import annotations

import math
import re
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

import ijson

from kernels_check.trace.file import EXPECTED, TraceError, TraceFile
from kernels_check.trace.limits import JsonLimits

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
