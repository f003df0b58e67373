"""Attributes operators and kernels to the phases of a profiled step, from the profiler's records.

Phases are marked on the host. On a GPU the device is synchronised at every boundary, so that a kernel runs inside the
window of the phase that launched it; on a CPU operators nest, and the time of an operator excludes those that it calls.
The categories of names are those of kernels_check.

Four kinds of work are identified in the records:

- Copies of whole weights. torch's `linear` uses a weight as it is if it can fold its input into rows. Otherwise (a
  slice of the hidden states before weights without gradients) it calls a batched product, which on a CPU first copies
  the transposed weight: the whole output head, at each first token. Only the shape of the copy identifies it.
- Casts: copies between two types.
- Products of 32-bit numbers, by the types of their factors.
- The backward pass of dropout. A gradient is multiplied by its mask with an ordinary `aten::mul`, which the profiler's
  sequence numbers identify: autograd numbers the nodes of its graph by thread, every operator has the number of the
  next node, and so has the call of the node in the backward pass.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from torch._C._autograd import DeviceType

from kernels_check.rules import classify
from kernels_check.trace.events import busy_time_us, make_events, operator_times, sum_by_name
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
"""Prefix of phase names in the profiler's annotations."""
PART = "lorameter.part."
"""Prefix of the names of a phase's parts."""
_RUNTIME = ("cuda", "cu")
"""Prefixes of CUDA runtime and driver calls, which the profiler stores among the host's records."""
NO_KERNELS = (
    "the profiler recorded no kernel: CUPTI is missing, or the driver keeps it from this user "
    "(NVreg_RestrictProfilingToAdminUsers; in a container --cap-add=SYS_ADMIN lifts that)"
)
Seconds = Callable[[int, int], float]
"""Seconds between two host times in nanoseconds: the difference, or on a GPU the time of the kernels launched between
them."""


def summarise_activity(
    events: Iterable[Any],
    step_times_s: tuple[float, ...],
    device: str,
    *,
    phase_names: Sequence[str] = STEP_PHASES,
    weights: Mapping[tuple[int, int], str] | None = None,
) -> Activity:
    """The mean of several steps or requests that were profiled with marked phases.

    Args:
        events: the profiler's records (`_KinetoEvent`); those outside of all phases are ignored.
        step_times_s: time of each step under the profiler.
        device: torch device type on which they ran.
        phase_names: the phases in order.
        weights: names of the model's weights by output and input size.
    """
    windows, parts, host, kernels = _sort_events(events)
    cuda, steps = device.startswith("cuda"), len(step_times_s)
    seconds = _kernel_seconds(kernels, host) if cuda else _wall_seconds
    dropout_nodes = _nodes_made_by(host, DROPOUT_OPERATOR)
    moments = sorted(one.start_ns() for one in host)

    def count_records(operators: Sequence[Any]) -> float:
        """Number of host records that begin during these operators, in the mean step."""
        return (
            sum(bisect_right(moments, one.end_ns()) - bisect_left(moments, one.start_ns()) for one in operators) / steps
        )

    operators_by_phase, kernels_by_phase, parts_by_phase = (_group(windows, found) for found in (host, kernels, parts))
    phases = []
    for phase in phase_names:
        operators, marked = operators_by_phase.get(phase, []), parts_by_phase.get(phase, [])
        separate = {
            "casts_s": _casts(operators),
            "wide_products_s": [one for one in operators if _is_wide_product(one)],
            "dropout_backward_s": [
                one
                for one in operators
                if one.name().startswith(_CALL) and (one.fwd_thread_id(), one.sequence_nr()) in dropout_nodes
            ],
        }
        dropouts = [one for one in operators if one.name() == DROPOUT_OPERATOR]
        ran = kernels_by_phase.get(phase, []) if cuda else operators
        uses, totals_s, busy_s = _sum_uses(ran, windows[0].start_ns(), steps, nested=not cuda)
        counted = {name: count_records(found) for name, found in {**separate, DROPOUT: dropouts}.items()}
        phases.append(
            PhaseActivity(
                phase=phase,
                window_s=sum(_measure(one, _wall_seconds) for one in windows if one.name() == MARK + phase) / steps,
                busy_s=busy_s,
                operators=uses,
                totals_s=totals_s,
                **{name: sum(_measure(one, seconds) for one in found) / steps for name, found in separate.items()},
                records={} if cuda else {WHOLE: len(operators) / steps, **counted},
                copies=_copies(operators, weights or {}, seconds, steps),
                parts_s={
                    name.removeprefix(PART): sum(_measure(one, seconds) for one in marked if one.name() == name) / steps
                    for name in dict.fromkeys(one.name() for one in marked)
                },
            )
        )
    missing = NO_KERNELS if cuda and not kernels else ""
    return Activity(device="cuda" if cuda else "cpu", step_times_s=step_times_s, phases=tuple(phases), missing=missing)


def _group(windows: Sequence[Any], found: Iterable[Any]) -> dict[str, list[Any]]:
    """Records grouped by the phase in which they begin, without those that begin between phases."""
    starts = [one.start_ns() for one in windows]
    groups: dict[str, list[Any]] = {}
    for one in found:
        place = bisect_right(starts, one.start_ns()) - 1
        if place >= 0 and one.start_ns() < windows[place].end_ns():
            groups.setdefault(windows[place].name().removeprefix(MARK), []).append(one)
    return groups


def _sort_events(events: Iterable[Any]) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """Marks of the phases in order, marks of their parts, CPU operators, and GPU kernels."""
    windows: list[Any] = []
    parts: list[Any] = []
    host: list[Any] = []
    device: list[Any] = []
    for event in events:
        name, marked = event.name(), event.is_user_annotation()
        on_host = event.device_type() == DeviceType.CPU
        runtime = name.startswith(_RUNTIME) and "::" not in name  # such as `cudaLaunchKernel`
        if on_host and marked and name.startswith(PART):
            parts.append(event)
        elif on_host and marked and name.startswith(MARK):
            windows.append(event)
        elif on_host and not (marked or event.is_async() or name.startswith("[") or runtime):
            host.append(event)
        elif event.device_type() == DeviceType.CUDA and not (marked or event.is_hidden_event()):
            device.append(event)
    return sorted(windows, key=lambda one: one.start_ns()), parts, host, device


def _sum_uses(
    ran: Sequence[Any], origin: int, steps: int, *, nested: bool
) -> tuple[tuple[OperatorUse, ...], dict[str, float], float]:
    """For a mean step: kernels, or operators without those that they call; seconds of operators by name, including
    those that they call; and the length of the union of all, in seconds."""
    rows = []
    for number, one in enumerate(ran):  # two calls with the same times remain two calls
        lane = (str(one.device_index()), str(one.start_thread_id() or one.device_resource_id()))
        start_us, duration_us = (one.start_ns() - origin) / 1e3, (one.end_ns() - one.start_ns()) / 1e3
        rows.append((one.name(), lane, start_us, duration_us, number))
    events = make_events(rows)
    whole = sum_by_name(events)
    own = (
        [(one.name, one.rule, one.calls, one.time_ms) for one in operator_times(events)]
        if nested
        else [(one.name, classify(one.name), one.calls, one.time_ms) for one in whole]
    )
    uses = [
        OperatorUse(
            name=name, category="other" if rule is None else rule.category_of(name), calls=calls / steps,
            time_s=time_ms / 1e3 / steps,
        )
        for name, rule, calls, time_ms in own
    ]  # fmt: skip
    return (
        tuple(sorted(uses, key=lambda use: (-use.time_s, use.name))),
        {one.name: one.time_ms / 1e3 / steps for one in whole} if nested else {},
        sum(busy_time_us(events).values()) / 1e6 / steps,
    )


# --- times ------------------------------------------------------------------------------------------------------------


def _wall_seconds(start_ns: int, end_ns: int) -> float:
    return (end_ns - start_ns) / 1e9


def _kernel_seconds(kernels: Sequence[Any], host: Sequence[Any]) -> Seconds:
    """Seconds of all kernels launched in a window, by the profiler's links to CPU operators."""
    by_operator: dict[int, float] = {}
    for kernel in kernels:
        link = kernel.linked_correlation_id()
        by_operator[link] = by_operator.get(link, 0.0) + _wall_seconds(kernel.start_ns(), kernel.end_ns())
    by_operator.pop(0, None)  # kernels without an operator
    launches = sorted(
        (one.start_ns(), by_operator[one.correlation_id()]) for one in host if one.correlation_id() in by_operator
    )
    sums = [0.0, *accumulate(time_s for _, time_s in launches)]

    def seconds(start_ns: int, end_ns: int) -> float:
        first = bisect_left(launches, start_ns, key=lambda one: one[0])
        return sums[bisect_right(launches, end_ns, key=lambda one: one[0])] - sums[first]

    return seconds


def _measure(operator: Any, seconds: Seconds) -> float:
    return seconds(operator.start_ns(), operator.end_ns())


# --- copies, casts and products of 32 bits ----------------------------------------------------------------------------

_COPYING = ("aten::contiguous", "aten::clone", "aten::_to_copy", "aten::copy_")
"""Operators that copy their input; of nested ones the outermost counts."""
_CASTING = (
    "aten::to", "aten::_to_copy", "aten::copy_",
    "aten::add", "aten::add_", "aten::sub", "aten::sub_", "aten::mul", "aten::mul_", "aten::div", "aten::div_",
)  # fmt: skip
"""Operators that copy from one dtype to another, and operators on two tensors, which cast if the dtypes differ."""
_COMPUTED = frozenset(("float", "c10::BFloat16", "c10::Half"))
"""Dtypes in which models compute, by the profiler's names; a Python number is a double."""
MIN_WEIGHT_ELEMENTS = 2**16
"""Minimum elements of a weight whose copies are reported."""
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmv", "aten::mv")
"""Matrix-product operators; none of them calls another."""


def _copies(
    host: Sequence[Any], weights: Mapping[tuple[int, int], str], seconds: Seconds, steps: int
) -> tuple[WeightCopy, ...]:
    """The copies of whole weights in the mean step, by weight and shape, the slowest first.

    Inside a linear product a copy is recognised by the weight's two widths, in any order, and elsewhere by the exact
    shape of the weight.
    """
    products = sorted((one for one in host if one.name() == "aten::linear"), key=lambda one: one.start_ns())
    groups: dict[tuple[str, tuple[int, ...], bool], list[Any]] = {}
    for operator, *_ in _outermost(host, _COPYING):
        shape: list[int] = next(iter(operator.shapes()), [])
        if math.prod(shape) < MIN_WEIGHT_ELEMENTS or len(shape) < 2:
            continue
        place = bisect_right(products, operator.start_ns(), key=lambda one: one.start_ns()) - 1
        within = products[place] if place >= 0 and operator.end_ns() <= products[place].end_ns() else None
        name = weights.get((shape[0], shape[1])) if len(shape) == 2 else None
        if within is not None:
            input_shape, weight, *_ = within.shapes()
            whole = len(weight) == 2 and sorted(shape[-2:]) == sorted(weight) and list(shape) != list(input_shape)
            name = weights.get((weight[0], weight[1]), "") if whole else None
        if name is not None:
            groups.setdefault((name, tuple(shape), within is not None), []).append(operator)
    copies = [
        WeightCopy(
            weight=weight, shape=shape, operator=group[0].name(), calls=len(group) / steps,
            time_s=sum(_measure(one, seconds) for one in group) / steps, in_product=in_product,
        )
        for (weight, shape, in_product), group in groups.items()
    ]  # fmt: skip
    return tuple(sorted(copies, key=lambda one: -one.time_s))


def _casts(host: Sequence[Any]) -> list[Any]:
    """Operators that cast: every copy between two dtypes, with the operator that calls it.

    On a CPU they include sums and products of tensors of two dtypes, one of which is copied first; with equal dtypes
    these take a small part of the time. A GPU converts while it reads.
    """
    return [calls[0] for calls in _outermost(host, _CASTING) if any(map(_is_cast, calls))]


def _is_cast(operator: Any) -> bool:
    """Whether an operator copies between two dtypes in which models compute; scalars are ignored."""
    if operator.name() != "aten::copy_" or not next(iter(operator.shapes()), []):
        return False
    types = set(operator.dtypes()[:2])
    return len(types) == 2 and types <= _COMPUTED


def _is_wide_product(operator: Any) -> bool:
    """Whether an operator is a 32-bit matrix product."""
    return operator.name() in _PRODUCTS and {kind for kind in operator.dtypes() if kind not in ("", "Scalar")} == {
        "float"
    }


def _outermost(host: Sequence[Any], names: Sequence[str]) -> list[list[Any]]:
    """Outermost calls of these operators, by thread; each with its inner calls of these operators."""
    calls: list[list[Any]] = []
    last: dict[int, list[Any]] = {}
    for one in sorted((one for one in host if one.name() in names), key=lambda one: (one.start_ns(), -one.end_ns())):
        thread = one.start_thread_id()
        if thread not in last or one.start_ns() >= last[thread][0].end_ns():
            last[thread] = []
            calls.append(last[thread])
        last[thread].append(one)
    return calls


# --- backward pass of an operator -------------------------------------------------------------------------------------

_CALL = "autograd::engine::evaluate_function: "
"""Prefix of a node's name in the record of the engine's call of the node."""
Node = tuple[int, int]
"""A node of autograd's graph: the thread that created it, and its number there."""


def _nodes_made_by(host: Sequence[Any], maker: str) -> set[Node]:
    """Nodes of the graph that were created inside operators of this name.

    Operators that create no node also have the number of the next node: the last operator with a number has created it.
    Calls of nodes also have the thread of the forward pass, which operators of that pass lack.
    """
    ends: dict[int, int] = {}
    last: dict[Node, bool] = {}
    for one in sorted(host, key=lambda one: one.start_ns()):
        thread = one.start_thread_id()
        if one.name() == maker:
            ends[thread] = one.end_ns()
        if one.sequence_nr() >= 0 and not one.fwd_thread_id():
            last[(thread, one.sequence_nr())] = one.start_ns() <= ends.get(thread, -1)
    return {node for node, within in last.items() if within}
