"""Products of numbers of 32 bits, told from others by the types that the profiler keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorameter.trial.profiling.copies import KernelTimes, seconds_of

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
