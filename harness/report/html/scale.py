"""From values to places on a picture, and the round numbers beside its axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.records.units import Unit, scale_of
from harness.report.figure import Axis

TICKS = 5
"""About how many round numbers stand beside an axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """A straight map of values to pixels."""

    low: float
    high: float
    begin: float
    end: float
    unit: Unit

    def place(self, value: float) -> float:
        """Where a value is drawn; what lies outside is drawn at the border."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[tuple[float, str]]:
        """Round values within the scale, each with how it is written: all in one unit, with as many decimals."""
        factor, symbol = scale_of(max(abs(self.low), abs(self.high)), self.unit)
        step = round_step((self.high - self.low) / factor / TICKS)
        places = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(self.low / factor / step - 1e-9), math.floor(self.high / factor / step + 1e-9)
        suffix = symbol if symbol.startswith("/") else f" {symbol}".rstrip()
        return [(place * step * factor, f"{place * step:.{places}f}{suffix}") for place in range(first, last + 1)]


def round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below `least` (which is above 0)."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= least * (1 - 1e-9))


def scale_for(axis: Axis, values: Iterable[float], begin: float, end: float, *, from_zero: bool = False) -> Scale:
    """A scale that holds all values and the axis' line, with a little room around them."""
    found = finite([*values, *([] if axis.line_at is None else [axis.line_at])])
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
    room = 0.04 * (high - low) or 0.04 * abs(high) or 1.0
    return Scale(
        low=low if from_zero and low == 0 else low - room, high=high + room, begin=begin, end=end, unit=axis.unit
    )


def finite(values: Iterable[float | None]) -> Sequence[float]:
    """Those that are numbers."""
    return [value for value in values if value is not None and math.isfinite(value)]
