"""Copies that a profile tells apart: of whole weights, and from one type to another.

torch's `linear` takes a weight as it lies where it can fold what comes in into rows. Where it cannot (a slice of the
hidden states, whose strides are those of the whole prompt, before weights that need no gradient), it goes by a batched
product, and on a CPU that copies the transposed weight first: the whole output head, at each first token. Nothing in a
program says so. What does is the shape of what is copied inside the product.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from lorameter.records.activity import WeightCopy

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
        dataclasses.replace(group[0], calls=len(group) / steps, time_s=sum(one.time_s for one in group) / steps)
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
