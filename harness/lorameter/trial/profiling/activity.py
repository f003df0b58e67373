"""What ran in each phase of a profiled step, from the profiler's own records.

Phases are marked on the host. On a GPU the device is synchronised at every border, so that a kernel runs inside the
window of the phase that launched it; on a CPU operators nest, and the time of one is what it spends outside those that
it calls. Categories of names are those of kernels_check.

Four kinds of work are identified in the records:

- Copies of whole weights. torch's `linear` uses a weight as it is if it can fold its input into rows. Otherwise (a
  slice of the hidden states before weights without gradients) it calls a batched product, and on a CPU that first
  copies the transposed weight: the whole output head, at each first token. Only the shape of the copy shows it.
- Casts: copies between two types.
- Products of 32-bit numbers, by the types of their factors.
- The backward pass of dropout. A gradient is multiplied by its mask with an ordinary `aten::mul`, which the profiler's
  sequence numbers identify: autograd counts the nodes of its graph by thread, every operator bears the number of the
  node that would be made next, and so does the call of the node in the backward pass.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, Literal

import msgspec
from torch._C._autograd import DeviceType

from kernels_check.rules import Rule, classify
from kernels_check.trace.events import Events, Row, busy_time_us, make_events, operator_times, sum_by_name
from lorameter.records.activity import (
    DROPOUT,
    DROPOUT_OPERATOR,
    STEP_PHASES,
    WHOLE,
    Activity,
    OperatorUse,
    PhaseActivity,
    WeightCopy,
)

MARK = "lorameter."
"""Prefix of phases in the profiler's annotations."""
PART = "lorameter.part."
"""Prefix of the parts of a phase."""
_RUNTIME = ("cuda", "cu")
"""How calls of the CUDA runtime and driver begin, which the profiler keeps among the records of the host."""


NO_KERNELS = (
    "the profiler recorded no kernel: CUPTI is missing, or the driver keeps it from this user "
    "(NVreg_RestrictProfilingToAdminUsers; in a container --cap-add=SYS_ADMIN lifts that)"
)


def activity_of(
    events: Iterable[Any],
    step_times_s: tuple[float, ...],
    device: str,
    *,
    phase_names: Sequence[str] = STEP_PHASES,
    weights: Mapping[tuple[int, int], str] | None = None,
) -> Activity:
    """The mean step, or request, of some that were profiled with their phases marked.

    Args:
        events: the profiler's records (`_KinetoEvent`); what lies in no phase is left out.
        step_times_s: of each of the steps, under the profiler.
        device: where they ran, as torch names it.
        phase_names: the phases, in their order.
        weights: outputs and inputs of the model's weights, and what they are called.

    Raises:
        ValueError: no phase is marked.
    """
    windows, parts, host, kernels = _sorted_out(events)
    if not windows:
        raise ValueError("no phase of a step is marked in the profiler's records")
    kind: Literal["cpu", "cuda"] = "cuda" if device.startswith("cuda") else "cpu"
    ran = _by_phase(kernels if kind == "cuda" else host, windows, phase_names)
    steps = len(step_times_s)
    times = KernelTimes(kernels, host) if kind == "cuda" else None
    copied = copies_of(host, weights or {}, times)
    separate = {
        "casts_s": cast_times(host, times),
        "wide_products_s": wide_product_times(host, times),
        "dropout_backward_s": backward_times(host, DROPOUT_OPERATOR, times),
    }
    masks = [(one.start_ns(), seconds_of(one, times)) for one in host if one.name() == DROPOUT_OPERATOR]
    starts, records = [start for start, _, _ in windows], sorted(one.start_ns() for one in host)

    def begins_in(phase: str, found: Sequence[Any]) -> list[Any]:
        """Those of these tuples whose first item is a moment in this phase."""
        return [one for one in found if _phase_at(windows, starts, one[0]) == phase]

    def count_records(start_ns: int, seconds: float) -> int:
        """How many records of the host begin in this time."""
        return bisect_right(records, start_ns + round(1e9 * seconds)) - bisect_left(records, start_ns)

    phases = []
    for phase in phase_names:
        spans = [end - start for start, end, name in windows if name == phase]
        used = _kernels(ran[phase]) if kind == "cuda" else _operators(ran[phase])
        uses = [
            OperatorUse(name=name, category=_category(name, rule), calls=calls / steps, time_s=time_ms / 1e3 / steps)
            for name, rule, calls, time_ms in used
        ]
        called = sum_by_name(ran[phase]) if kind == "cpu" else []
        counted = {WHOLE: len(ran[phase]) / steps} if kind == "cpu" else {}
        for name, found in (*separate.items(), (DROPOUT, masks)) if kind == "cpu" else ():
            counted[name] = sum(count_records(*span) for span in begins_in(phase, found)) / steps
        phases.append(
            PhaseActivity(
                phase=phase,
                window_s=sum(spans) / 1e9 / steps,
                busy_s=sum(busy_time_us(ran[phase]).values()) / 1e6 / steps,
                operators=tuple(sorted(uses, key=lambda use: (-use.time_s, use.name))),
                totals_s={one.name: one.time_ms / 1e3 / steps for one in called},
                **{name: sum(s for _, s in begins_in(phase, found)) / steps for name, found in separate.items()},
                records=counted,
                copies=sum_copies([copy for _, copy in begins_in(phase, copied)], steps),
                parts_s=_parts_s(begins_in(phase, parts), times, steps),
            )
        )
    missing = NO_KERNELS if kind == "cuda" and not kernels else ""
    return Activity(device=kind, step_times_s=step_times_s, phases=tuple(phases), missing=missing)


Window = tuple[int, int, str]
"""Start and end in nanoseconds, and the phase."""


def _phase_at(windows: Sequence[Window], starts: Sequence[int], moment: int) -> str:
    """The phase at a moment in nanoseconds; "" between phases."""
    place = bisect_right(starts, moment) - 1
    return windows[place][2] if place >= 0 and moment < windows[place][1] else ""


def _parts_s(parts: Sequence[Window], times: KernelTimes | None, steps: int) -> dict[str, float]:
    """Seconds of each part by name: the host's, or on a GPU those of the kernels that it launched meanwhile."""
    found: dict[str, float] = {}
    for start, end, name in parts:
        seconds = (end - start) / 1e9 if times is None else times.launched_s(start, end)
        found[name] = found.get(name, 0.0) + seconds / steps
    return found


def _sorted_out(events: Iterable[Any]) -> tuple[list[Window], list[Window], list[Any], list[Any]]:
    """Windows of the phases in order, those of parts, the operators of the host, what ran on the device."""
    windows: list[Window] = []
    parts: list[Window] = []
    host: list[Any] = []
    device: list[Any] = []
    for event in events:
        name, marked = event.name(), event.is_user_annotation()
        if event.device_type() == DeviceType.CPU:
            if marked and name.startswith(PART):
                parts.append((event.start_ns(), event.end_ns(), name.removeprefix(PART)))
            elif marked and name.startswith(MARK):
                windows.append((event.start_ns(), event.end_ns(), name.removeprefix(MARK)))
            elif not (marked or event.is_async() or _is_runtime(name)):
                host.append(event)
        elif event.device_type() == DeviceType.CUDA and not (marked or event.is_hidden_event()):
            device.append(event)
    return sorted(windows), parts, host, device


def _is_runtime(name: str) -> bool:
    """`cudaLaunchKernel` and `cuMemcpyAsync`, but no operator, whose name has a namespace or is a class's."""
    return (name.startswith(_RUNTIME) and "::" not in name) or name.startswith("[")


def _by_phase(events: Iterable[Any], windows: list[Window], phase_names: Sequence[str]) -> dict[str, Events]:
    rows: dict[str, list[Row]] = {phase: [] for phase in phase_names}
    starts = [start for start, _, _ in windows]
    number = count()  # two calls with the same times are two calls
    for event in events:
        phase = _phase_at(windows, starts, event.start_ns())
        if not phase:
            continue
        lane = (str(event.device_index()), str(event.start_thread_id() or event.device_resource_id()))
        start_us = (event.start_ns() - starts[0]) / 1e3
        duration_us = (event.end_ns() - event.start_ns()) / 1e3
        rows[phase].append((event.name(), lane, start_us, duration_us, next(number)))
    return {phase: make_events(some) for phase, some in rows.items()}


Used = Iterator[tuple[str, Rule | None, int, float]]
"""Name, rule, calls and milliseconds."""


def _operators(events: Events) -> Used:
    for one in operator_times(events):
        yield one.name, one.rule, one.calls, one.time_ms


def _kernels(events: Events) -> Used:
    for one in sum_by_name(events):
        yield one.name, classify(one.name), one.calls, one.time_ms


def _category(name: str, rule: Rule | None) -> str:
    return "other" if rule is None else rule.category_of(name)


# --- copies and casts -------------------------------------------------------------------------------------------------

_COPYING = ("aten::contiguous", "aten::clone", "aten::_to_copy", "aten::copy_")
"""Operators that copy what they are given; the outermost of those that call each other counts."""
_CASTING = (
    "aten::to", "aten::_to_copy", "aten::copy_",
    "aten::add", "aten::add_", "aten::sub", "aten::sub_", "aten::mul", "aten::mul_", "aten::div", "aten::div_",
)  # fmt: skip
"""Operators that copy from one type to another, and those of two tensors, which do so where these are of two."""
_COMPUTED = frozenset(("float", "c10::BFloat16", "c10::Half"))
"""Types that models compute in, as the profiler names them; the double of a bare number is none of them."""
_LEAST = 2**16
"""Elements of a weight whose copying can be worth a word."""


class KernelTimes:
    """What the device did for the operators of the host, by the profiler's own links."""

    def __init__(self, kernels: Sequence[Any], host: Sequence[Any]) -> None:
        """`kernels` and `host` are the profiler's records."""
        by_operator: dict[int, float] = {}
        for kernel in kernels:
            link = getattr(kernel, "linked_correlation_id", int)()
            by_operator[link] = by_operator.get(link, 0.0) + (kernel.end_ns() - kernel.start_ns()) / 1e9
        by_operator.pop(0, None)  # of no operator
        launches = sorted(
            (operator.start_ns(), by_operator[number])
            for operator in host
            if (number := getattr(operator, "correlation_id", int)()) in by_operator
        )
        self._starts = [start for start, _ in launches]
        self._seconds = [seconds for _, seconds in launches]

    def launched_s(self, start_ns: int, end_ns: int) -> float:
        """Seconds of all that was launched in a window of the host."""
        return sum(self._seconds[bisect_left(self._starts, start_ns) : bisect_right(self._starts, end_ns)])


def copies_of(
    host: Sequence[Any], weights: Mapping[tuple[int, int], str], times: KernelTimes | None
) -> list[tuple[int, WeightCopy]]:
    """Each copy of a whole weight with the moment of its beginning, in nanoseconds.

    A copy is one of a weight where it is made inside a linear product and has the weight's two widths, in either order,
    or where something of exactly a weight's shape is copied by itself.

    Args:
        host: the profiler's records of operators, with the shapes that they were given.
        weights: outputs and inputs of the model's weights, and what they are called.
        times: on a GPU, where an operator's time is that of its kernels.
    """
    products = sorted((one for one in host if one.name() == "aten::linear"), key=lambda one: one.start_ns())
    starts = [one.start_ns() for one in products]
    found = []
    for operator, *_ in _outermost(host, _COPYING):
        shape: list[int] = next(iter(operator.shapes()), [])
        if math.prod(shape) < _LEAST:
            continue
        place = bisect_right(starts, operator.start_ns()) - 1
        within = products[place] if place >= 0 and operator.end_ns() <= products[place].end_ns() else None
        name = _weight_of(shape, within, weights)
        if name is not None:
            copy = WeightCopy(
                weight=name, shape=tuple(shape), operator=operator.name(), calls=1.0,
                time_s=seconds_of(operator, times), in_product=within is not None,
            )  # fmt: skip
            found.append((operator.start_ns(), copy))
    return found


def sum_copies(copies: Sequence[WeightCopy], steps: int) -> tuple[WeightCopy, ...]:
    """Copies of one weight and shape as one, in the mean of so many steps, the dearest first."""
    sums: dict[tuple[str, tuple[int, ...], bool], list[WeightCopy]] = {}
    for copy in copies:
        sums.setdefault((copy.weight, copy.shape, copy.in_product), []).append(copy)
    means = [
        msgspec.structs.replace(group[0], calls=len(group) / steps, time_s=sum(one.time_s for one in group) / steps)
        for group in sums.values()
    ]
    return tuple(sorted(means, key=lambda one: -one.time_s))


def cast_times(host: Sequence[Any], times: KernelTimes | None) -> list[tuple[int, float]]:
    """Beginning in nanoseconds and seconds of all that is done because one number has another type than another.

    That is every copy between two types with what is around it, and on a CPU every sum or product of tensors of two
    types, one of which it copies first; of one type it takes a small part of the time. A GPU's converts as it reads.
    """
    casts = (calls[0] for calls in _outermost(host, _CASTING) if any(map(_is_cast, calls)))
    return [(one.start_ns(), seconds_of(one, times)) for one in casts]


def _is_cast(operator: Any) -> bool:
    """A copy from one type that models compute in to another; a bare number is no tensor worth a word."""
    if operator.name() != "aten::copy_" or not next(iter(operator.shapes()), []):
        return False
    types = set(operator.dtypes()[:2])
    return len(types) == 2 and types <= _COMPUTED


def _outermost(host: Sequence[Any], names: Sequence[str]) -> list[list[Any]]:
    """Calls of these operators that no other of them has called, by thread; each before those of them that it calls."""
    found: list[list[Any]] = []
    last: dict[int, list[Any]] = {}
    for one in sorted((one for one in host if one.name() in names), key=lambda one: (one.start_ns(), -one.end_ns())):
        thread = one.start_thread_id()
        if thread not in last or one.start_ns() >= last[thread][0].end_ns():
            last[thread] = []
            found.append(last[thread])
        last[thread].append(one)
    return found


def _weight_of(shape: Sequence[int], product: Any, weights: Mapping[tuple[int, int], str]) -> str | None:
    """What the weight of a copy is called; None where it is of none."""
    if len(shape) < 2:
        return None
    if product is None:
        return weights.get((shape[0], shape[1])) if len(shape) == 2 else None
    given, weight, *_ = product.shapes()
    if len(weight) != 2 or sorted(shape[-2:]) != sorted(weight) or list(shape) == list(given):
        return None
    return weights.get((weight[0], weight[1]), "")


def seconds_of(operator: Any, times: KernelTimes | None) -> float:
    """Of an operator with all that it calls; on a GPU of its kernels."""
    start, end = operator.start_ns(), operator.end_ns()
    return (end - start) / 1e9 if times is None else times.launched_s(start, end)


# --- products of 32 bits ----------------------------------------------------------------------------------------------

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmv", "aten::mv")
"""Operators that multiply matrices, none of which calls another."""


def wide_product_times(host: Sequence[Any], times: KernelTimes | None) -> list[tuple[int, float]]:
    """Beginning in nanoseconds and seconds of each product whose factors are of 32 bits.

    `host` are the profiler's records of operators; on a GPU `times` tells what their kernels take.
    """
    return [
        (one.start_ns(), seconds_of(one, times))
        for one in host
        if one.name() in _PRODUCTS and {kind for kind in one.dtypes() if kind not in ("", "Scalar")} == {"float"}
    ]


# --- backward pass of an operator -------------------------------------------------------------------------------------

_CALL = "autograd::engine::evaluate_function: "
"""Before the name of a node, where the engine calls it with all that belongs to it."""
Node = tuple[int, int]
"""Of autograd's graph: the thread that made it, and its number there."""


def backward_times(host: Sequence[Any], maker: str, times: KernelTimes | None) -> list[tuple[int, float]]:
    """Beginning in nanoseconds and seconds of each call of a node that an operator of this name made.

    Args:
        host: the profiler's records of operators.
        maker: an operator of the forward pass; what it calls counts as its own.
        times: on a GPU, where the time of a call is that of its kernels.
    """
    made = _made_by(host, maker)
    return [
        (one.start_ns(), seconds_of(one, times))
        for one in host
        if one.name().startswith(_CALL) and (one.fwd_thread_id(), one.sequence_nr()) in made
    ]


def _made_by(host: Sequence[Any], maker: str) -> set[Node]:
    """Nodes of the graph that were made inside such operators.

    Operators that make none bear the number of the next one, too: the last that does has made it. Calls of nodes bear
    their numbers and the thread of the forward pass, which operators of that pass have not.
    """
    spans: dict[int, list[tuple[int, int]]] = {}
    last: dict[Node, int] = {}
    for one in sorted(host, key=lambda one: one.start_ns()):
        if one.name() == maker:
            spans.setdefault(one.start_thread_id(), []).append((one.start_ns(), one.end_ns()))
        if one.sequence_nr() >= 0 and not one.fwd_thread_id():
            last[(one.start_thread_id(), one.sequence_nr())] = one.start_ns()
    return {node for node, moment in last.items() if _is_within(moment, spans.get(node[0], ()))}


def _is_within(moment: int, spans: Sequence[tuple[int, int]]) -> bool:
    """Of spans in order, none of which overlaps another: those of one operator on one thread."""
    place = bisect_right(spans, moment, key=lambda span: span[0]) - 1
    return place >= 0 and moment <= spans[place][1]
