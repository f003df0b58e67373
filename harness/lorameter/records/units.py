"""Formats values: with a unit, in a readable scale, and with only the digits that the interval supports.

Values are in base units everywhere (seconds, bytes, tokens a second); scaling happens here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from kernels_check.check import format_count as format_count

Unit = Literal["s", "byte", "1/s", "J", "points", "1"]


_SCALES: dict[Unit, tuple[tuple[float, str], ...]] = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")),
    "byte": ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B")),
    "1/s": ((1.0, "/s"),),
    "J": ((1e3, "kJ"), (1.0, "J"), (1e-3, "mJ"), (1e-6, "µJ")),
    "points": ((1.0, "points"),),
    "1": ((1.0, ""),),
}


def choose_scale(value: float, unit: Unit) -> tuple[float, str]:
    """The factor and the symbol in which `value` is readable: the largest unit not above the value."""
    for factor, symbol in _SCALES[unit]:
        if abs(value) >= factor:
            return factor, symbol
    return _SCALES[unit][-1]


def three_digits(value: float) -> str:
    """Format with three significant digits, or with all integer digits if there are more; never in scientific notation
    for large values."""
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def format_percent(fraction: float) -> str:
    """Format a fraction in per cent: two significant digits, or all integer digits."""
    percent = 100 * fraction
    return f"{percent:.0f} %" if percent >= 9.95 else f"{percent:.2g} %"


def count_decimals(spread: float) -> int:
    """Decimals that a half-width of `spread` supports: up to its two leading digits."""
    if spread <= 0 or not math.isfinite(spread):
        return 3
    return max(0, 1 - math.floor(math.log10(spread)))


def split_interval(value: float, low: float | None, high: float | None, unit: Unit) -> tuple[str, str]:
    """`value unit` and `[low, high]`, all three in one scale and with the digits that the interval supports.

    Without an interval (one replicate) the value is followed by `[no interval]`.
    """
    factor, symbol = choose_scale(value, unit)
    suffix = symbol if symbol.startswith("/") else f" {symbol}".rstrip()
    if low is None or high is None:
        return f"{three_digits(value / factor)}{suffix}", "[no interval]"
    places = min(count_decimals((high - low) / 2 / factor), 4)
    return f"{value / factor:.{places}f}{suffix}", f"[{low / factor:.{places}f}, {high / factor:.{places}f}]"


def format_interval(value: float, low: float | None, high: float | None, unit: Unit) -> str:
    """`value unit [low, high]`, as `split_interval` writes them."""
    return " ".join(split_interval(value, low, high, unit))


def format_value(value: float, unit: Unit) -> str:
    """Format with three digits in a readable scale: for computed values, or for parts of a value with an interval."""
    factor, symbol = choose_scale(value, unit)
    return f"{three_digits(value / factor)}{symbol if symbol.startswith('/') else f' {symbol}'.rstrip()}"


def format_ratio(ratio: float | None, low: float | None, high: float | None) -> str:
    """A ratio with its interval; a dash if there is none."""
    return "–" if ratio is None else format_interval(ratio, low, high, "1")


def format_bytes(value: float) -> str:
    """Bytes in a readable binary unit, with three digits, or four between 1000 and 1024."""
    return format_value(value, "byte")


def format_duration(seconds: float) -> str:
    """A wall-clock duration: 42 s, 3 min 05 s, 1 h 12 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def first_few(words: Sequence[str], most: int, between: str = ", ") -> str:
    """The first few words, and the number of the others."""
    more = f"{between.rstrip(', ')} and {len(words) - most} more" if len(words) > most else ""
    return between.join(words[:most]) + more
