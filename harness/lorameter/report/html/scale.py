"""From values to places on a picture, and the round numbers beside its axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorameter.records.units import Unit, scale_of
from lorameter.report.blocks import Axis

TICKS = 5
"""About how many round numbers stand beside an axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """A map of values to pixels, straight or by the logarithm."""

    low: float
    high: float
    begin: float
    end: float
    unit: Unit
    log: bool = False
    named: tuple[tuple[float, str], ...] = ()

    def place(self, value: float) -> float:
        """Where a value is drawn; what lies outside is drawn at the border."""
        low, high, at = (
            math.log(one) if self.log else one for one in (self.low, self.high, min(max(value, self.low), self.high))
        )
        return self.begin + (at - low) / (high - low) * (self.end - self.begin)

    def ticks(self) -> list[tuple[float, str]]:
        """Values within the scale, each with how it is written: those that have names, else round ones, all in one unit
        and with as many decimals."""
        if self.named:
            return [(value, text) for value, text in self.named if self.low <= value <= self.high]
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
    low, high = axis.span or ((min(found), max(found)) if found else (0.0, 1.0))
    if axis.log:
        room = (high / low) ** 0.04 if high > low else 1.1
        ends = low / room, high * room
    else:
        low = min(0.0, low) if from_zero else low
        room = 0.04 * (high - low) or 0.04 * abs(high) or 1.0
        ends = low if from_zero else low - room, high + room
    return Scale(
        low=ends[0], high=ends[1], begin=begin, end=end, unit=axis.unit, log=axis.log, named=axis.named
    )  # fmt: skip


def finite(values: Iterable[float | None]) -> Sequence[float]:
    """Those that are numbers."""
    return [value for value in values if value is not None and math.isfinite(value)]
