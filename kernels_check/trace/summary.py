"""Sums, busy share and kernels a step, from columns of events.

A GPU runs several streams at once, so the sum of durations can exceed the time that passed; the busy share is the
length of the *union* of the intervals of a device. An event that a tool wrote twice (merged files do that) counts once.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kernels_check.rules import CATEGORIES, UNDECIDED, Category, Rule, classify_operator
from kernels_check.trace.events import NO_CORRELATION, Events, KernelTotal, Kineto
from kernels_check.trace.file import KernelNameFacts

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCounts:
    """Kernels launched in each marked step."""

    steps: int
    lowest: int
    median: float
    highest: int


@dataclass(frozen=True, slots=True)
class EventArrays:
    """Events as arrays, each kept once."""

    name: Integers
    lane: Integers
    start_us: Floats
    duration_us: Floats
    """NaN where unknown."""
    correlation: Integers
    duplicates: int
    """How many were dropped because another was the same in every column."""


def columns(events: Events) -> EventArrays:
    """Drop repetitions; the order of the events in the file does not matter afterwards."""
    name, lane = _integers(events.name), _integers(events.lane)
    start, duration = np.array(events.start_us, dtype=np.float64), np.array(events.duration_us, dtype=np.float64)
    correlation = _integers(events.correlation)
    order = np.lexsort((correlation, name, lane, np.nan_to_num(duration, nan=-1.0), np.nan_to_num(start, nan=-np.inf)))
    name, lane, correlation = name[order], lane[order], correlation[order]
    start, duration = start[order], duration[order]
    same = np.ones(len(name), dtype=bool)
    same[:1] = False
    for key in (name, lane, start, duration, correlation):
        same[1:] &= key[1:] == key[:-1]  # NaN equals nothing: without a time two events are two
    kept = ~same
    return EventArrays(name[kept], lane[kept], start[kept], duration[kept], correlation[kept], int(same.sum()))


def totals(events: Events, kept: EventArrays) -> list[KernelTotal]:
    """Launches and summed time of each name; a launch without a usable duration counts with no time."""
    calls = np.bincount(kept.name, minlength=len(events.names))
    time_us = np.bincount(kept.name, weights=np.nan_to_num(kept.duration_us), minlength=len(events.names))
    return [
        KernelTotal(name=name, calls=int(calls[index]), time_ms=float(time_us[index]) / 1e3)
        for index, name in enumerate(events.names)
    ]


def busy_share(events: Events, kept: EventArrays) -> float | None:
    """Share of the time from the first start to the last end in which something ran, averaged over the devices.

    All devices are held against the same window, so one that finishes early is idle from then on. None where no event
    has a time.
    """
    timed = np.isfinite(kept.start_us + kept.duration_us)
    if not timed.any():
        return None
    start = kept.start_us[timed]
    start = start - start.min()  # in place of times since 1970, whose last bits a sum would lose
    end = start + kept.duration_us[timed]
    window = float(end.max())
    if window <= 0.0:
        return None
    device_of_lane: dict[str, int] = {}
    device = np.array([device_of_lane.setdefault(device, len(device_of_lane)) for device, _ in events.lanes])
    device = device[kept.lane[timed]]
    present = np.unique(device)
    busy = sum(_union(start[device == one], end[device == one]) for one in present)
    return min(1.0, busy / (window * len(present)))


def _union(start: Floats, end: Floats) -> float:
    """Length of the union of intervals: each adds what lies beyond everything that began before it."""
    order = np.argsort(start, kind="stable")
    start, end = start[order], end[order]
    reached = np.maximum.accumulate(end)
    before = np.concatenate((start[:1], reached[:-1]))
    return float(np.maximum(reached - np.maximum(before, start), 0.0).sum())


def step_counts(trace: Kineto, kept: EventArrays) -> StepCounts | None:
    """Count the kernels of each ProfilerStep; None where no step is marked.

    A kernel belongs to the step that launched it, which its correlation with the host's launch shows. Only where that
    is missing does it belong to the step in which it ran.
    """
    kernels = np.array([not name.startswith(("Memcpy", "Memset")) for name in trace.gpu.names], dtype=bool)
    chosen = kernels[kept.name] & np.isfinite(kept.start_us) if len(kernels) else np.zeros(0, dtype=bool)
    launched = _launch_times(trace, kept.correlation[chosen])
    known = np.isfinite(launched)
    on_gpu = trace.gpu_steps or trace.host_steps
    on_host = trace.host_steps
    if not on_gpu:
        return None
    counts: dict[int, int] = dict.fromkeys(on_host or on_gpu, 0)
    if not on_host:
        known[:] = False
    _count(counts, on_host, launched[known])
    _count(counts, on_gpu, kept.start_us[chosen][~known])
    values = np.array(list(counts.values()))
    return StepCounts(
        steps=len(values), lowest=int(values.min()), median=float(np.median(values)), highest=int(values.max())
    )


def _launch_times(trace: Kineto, correlation: Integers) -> Floats:
    known = _integers(trace.launch_correlation)
    found = np.full(len(correlation), np.nan)
    if len(known) == 0:
        return found
    order = np.argsort(known, kind="stable")
    known, when = known[order], np.array(trace.launch_us, dtype=np.float64)[order]
    position = np.minimum(np.searchsorted(known, correlation), len(known) - 1)
    hit = (known[position] == correlation) & (correlation != NO_CORRELATION)
    found[hit] = when[position[hit]]
    return found


def _count(counts: dict[int, int], steps: Mapping[int, tuple[float, float]], when: Floats) -> None:
    for step, (start, end) in steps.items():
        counts[step] = counts.get(step, 0) + int(((when >= start) & (when < end)).sum())


def _integers(values: object) -> Integers:
    return np.array(values, dtype=np.int64)


_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorTime:
    """One operator's own time, and the rule that it counts for."""

    name: str
    rule: Rule | None
    calls: int
    time_ms: float


@dataclass(slots=True)
class _OpenOperator:
    end_us: float
    key: tuple[int, int]
    attention: int
    """Index of the attention operator around it, itself included; -1 outside."""


def operator_times(events: Events, kept: EventArrays) -> list[OperatorTime]:
    """Own time and calls of each operator, those inside attention apart from the others.

    A call inside a call of the same name (the dispatcher records operators written in Python twice), or inside
    another attention operator, is no call of its own.
    """
    rules = [classify_operator(name) for name in events.names]
    is_attention = [rule is not None and rule.category == "attention" for rule in rules]
    time_us: defaultdict[tuple[int, int], float] = defaultdict(float)
    calls: defaultdict[tuple[int, int], int] = defaultdict(int)
    usable = np.isfinite(kept.start_us + kept.duration_us)
    order = np.lexsort((-kept.duration_us[usable], kept.start_us[usable], kept.lane[usable]))
    columns = [column[usable][order] for column in (kept.name, kept.lane)]
    times = [column[usable][order] for column in (kept.start_us, kept.duration_us)]
    lane_before, stack = -1, list[_OpenOperator]()
    for first in range(0, len(order), _CHUNK):  # lists of Python numbers take four times the memory of the columns
        part = slice(first, first + _CHUNK)
        names, lanes = (column[part].tolist() for column in columns)
        starts, durations = (column[part].tolist() for column in times)
        for name, lane, start, duration in zip(names, lanes, starts, durations, strict=True):
            if lane != lane_before:
                lane_before, stack = lane, []
            while stack and stack[-1].end_us <= start:
                stack.pop()
            caller = stack[-1] if stack else None
            inside = caller.attention if caller is not None else -1
            attention = inside if inside >= 0 else name if is_attention[name] else -1
            key = (name, attention)
            time_us[key] += duration
            if caller is not None:
                time_us[caller.key] -= min(duration, caller.end_us - start)
            if inside < 0 and (caller is None or caller.key[0] != name):
                calls[key] += 1
            stack.append(_OpenOperator(start + duration, key, attention))
    return [
        OperatorTime(
            name=events.names[name],
            rule=rules[attention if attention >= 0 else name],
            calls=calls[name, attention],
            time_ms=max(0.0, time) / 1e3,
        )
        for (name, attention), time in time_us.items()
    ]


SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Launches:
    """All launches of one name (on a trace without a GPU: all calls of one operator)."""

    name: str
    calls: int
    time_ms: float
    rule: Rule | None
    facts: KernelNameFacts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """How often something ran, and its part of the time."""

    calls: int
    time_share: float
    time_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendUse(Use):
    """One attention backend. Calls are launches: one backward pass of flash attention is three of them."""

    forward_calls: int
    backward_calls: int
    dtypes: Mapping[str, int]
    """Launches of each number format that their names prove."""
    causal_calls: int
    not_causal_calls: int
    """Of the launches whose template arguments say it; the others prove neither."""
    kernels: Mapping[str, int]
    """The evidence: launches of each full name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Attention backends by the names of ``attention.backend``."""

    backends: Mapping[str, BackendUse]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fourbit:
    """How 4-bit weights were used."""

    paths: Mapping[str, Use]
    """``fused``: multiplied without unpacking; ``dequantize``: unpacked for an ordinary product; ``dequantize_8bit``:
    blockwise 8-bit values, with 4-bit weights the constants of double quantisation; ``gemv``: older decoding kernel;
    ``packed_cpu``: the CPU's own layout."""
    quant_types: Mapping[str, Use]
    """Only a kernel that dequantizes names it."""
    dtypes: Mapping[str, int]
    """Launches of each compute dtype, of the 4-bit paths without ``dequantize_8bit``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unclassified:
    """What no rule knows."""

    time_share: float
    kernels: Mapping[str, Use]
    """Largest first."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names, largest first."""
        return tuple(self.kernels)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSummary:
    """The judgement of one recording."""

    source: Literal["kineto", "nsys"]
    device: Literal["gpu", "cpu"]
    """``cpu``: no kernel was recorded, operators on the host are judged in their place."""
    calls: int
    time_ms: float
    attention: Attention
    fourbit: Fourbit
    matmul_dtypes: Mapping[str, Use]
    """Matrix products by number format; ``unknown`` where the name does not say."""
    categories: Mapping[str, float]
    """Share of the time of each category; they add up to one."""
    category_time_ms: Mapping[str, float]
    busy_share: float | None
    """Part of the recorded time in which a device worked; None where the recording has no intervals of kernels."""
    kernels_per_step: StepCounts | None
    unclassified: Unclassified
    notices: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """One document of JSON values."""
        document = {"schema": SCHEMA} | asdict(self)
        document["unclassified"] = {
            "time_share": self.unclassified.time_share,
            "names": list(self.unclassified.names),
            "kernels": {name: asdict(use) for name, use in self.unclassified.kernels.items()},
        }
        document["notices"] = list(self.notices)
        return document


def summarise(
    launches: Iterable[Launches],
    *,
    source: Literal["kineto", "nsys"],
    device: Literal["gpu", "cpu"] = "gpu",
    operators: Collection[str] = (),
    busy_share: float | None = None,
    kernels_per_step: StepCounts | None = None,
    notices: Iterable[str] = (),
) -> KernelSummary:
    """Sum up what ran.

    Args:
        launches: with a time above zero in all.
        source: kind of recording.
        device: what the names are of.
        operators: names of the host's operators, where recorded: they distinguish attention's math backend from eager.
        busy_share: passed on.
        kernels_per_step: passed on.
        notices: what the reader should know with the numbers.
    """
    ran = [one for one in launches if one.calls or one.time_ms > 0.0]
    total_ms = math.fsum(one.time_ms for one in ran)

    def use(some: Collection[Launches]) -> Use:
        time_ms = math.fsum(one.time_ms for one in some)
        return Use(calls=sum(one.calls for one in some), time_share=time_ms / total_ms, time_ms=time_ms)

    by_category: dict[Category, list[Launches]] = {category: [] for category in CATEGORIES}
    for one in ran:
        by_category[one.rule.category_of(one.name) if one.rule is not None else "other"].append(one)
    attention = _grouped(by_category["attention"], lambda one: _backend(one, operators))
    paths = _grouped(ran, lambda one: one.rule.path if one.rule is not None else None)
    quant_types = _grouped(ran, lambda one: one.rule.quant_type if one.rule is not None else None)
    products = _grouped(by_category["matmul"], lambda one: (one.facts and one.facts.dtype) or "unknown")
    unknown = sorted((one for one in ran if one.rule is None), key=lambda one: (-one.time_ms, one.name))
    fourbit = [one for path, some in paths.items() if path != "dequantize_8bit" for one in some]
    return KernelSummary(
        source=source,
        device=device,
        calls=sum(one.calls for one in ran),
        time_ms=total_ms,
        attention=Attention(
            backends={name: _backend_use(use(some), some) for name, some in _by_time(attention).items()}
        ),
        fourbit=Fourbit(
            paths={name: use(some) for name, some in _by_time(paths).items()},
            quant_types={name: use(some) for name, some in _by_time(quant_types).items()},
            dtypes=_dtypes(fourbit),
        ),
        matmul_dtypes={name: use(some) for name, some in _by_time(products).items()},
        categories={category: use(some).time_share for category, some in by_category.items()},
        category_time_ms={category: use(some).time_ms for category, some in by_category.items()},
        busy_share=busy_share,
        kernels_per_step=kernels_per_step,
        unclassified=Unclassified(
            time_share=use(unknown).time_share, kernels={one.name: use([one]) for one in unknown}
        ),
        notices=tuple(notices),
    )


def _grouped(launches: Iterable[Launches], key: Callable[[Launches], str | None]) -> dict[str, list[Launches]]:
    groups: dict[str, list[Launches]] = {}
    for one in launches:
        name = key(one)
        if name is not None:
            groups.setdefault(name, []).append(one)
    return groups


def _by_time(groups: Mapping[str, list[Launches]]) -> dict[str, list[Launches]]:
    return dict(sorted(groups.items(), key=lambda group: (-sum(one.time_ms for one in group[1]), group[0])))


def _backend(one: Launches, operators: Collection[str]) -> str:
    """Name the backend; a softmax kernel alone does not distinguish SDPA's math from attention written out.

    The host's operators can: math calls ``_safe_softmax``, and eager attention never enters SDPA.
    """
    assert one.rule is not None
    backend = one.rule.backend or one.rule.name
    if backend != UNDECIDED or not operators:
        return backend
    if any(
        name == "aten::_safe_softmax" or name.startswith("aten::_scaled_dot_product_attention_math")
        for name in operators
    ):
        return "math"
    if "aten::scaled_dot_product_attention" not in operators and {"aten::softmax", "aten::_softmax"} & set(operators):
        return "eager"
    return backend


def _backend_use(use: Use, some: list[Launches]) -> BackendUse:
    def calls(*, direction: str | None = None, causal: bool | None = None) -> int:
        return sum(
            one.calls
            for one in some
            if one.facts is not None
            and (direction is None or one.facts.direction == direction)
            and (causal is None or one.facts.causal is causal)
        )

    return BackendUse(
        calls=use.calls,
        time_share=use.time_share,
        time_ms=use.time_ms,
        forward_calls=calls(direction="forward"),
        backward_calls=calls(direction="backward"),
        dtypes=_dtypes(some),
        causal_calls=calls(causal=True),
        not_causal_calls=calls(causal=False),
        kernels={one.name: one.calls for one in sorted(some, key=lambda one: (-one.time_ms, one.name)) if one.calls},
    )


def _dtypes(some: Iterable[Launches]) -> dict[str, int]:
    counts = Counter[str]()
    for one in some:
        if one.facts is not None and one.facts.dtype is not None:
            counts[one.facts.dtype] += one.calls
    return dict(counts.most_common())
