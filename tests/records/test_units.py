"""Tests of formatted numbers: a common scale, and only the digits that the interval supports."""

import pytest

from lorameter.records.units import (
    format_bytes,
    format_duration,
    format_interval,
    format_percent,
)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0.30734, 0.2951, 0.3201, "s"), "307 ms [295, 320]"),
        ((12.3456, 12.31, 12.38, "s"), "12.346 s [12.310, 12.380]"),
        ((1683.4, 1612.0, 1755.0, "1/s"), "1683/s [1612, 1755]"),
        ((4.5743, 4.551, 4.597, "1"), "4.574 [4.551, 4.597]"),
        ((0.03412, 0.0331, 0.0352, "J"), "34.1 mJ [33.1, 35.2]"),
        ((1812.0, 1790.0, 1834.0, "J"), "1.812 kJ [1.790, 1.834]"),
        ((0.412, None, None, "s"), "412 ms [no interval]"),
        ((1694.3, None, None, "1/s"), "1694/s [no interval]"),
    ],
)
def test_a_value_carries_its_interval(arguments, text):
    """The number of digits follows from two significant digits of the interval's half-width."""
    assert format_interval(*arguments) == text


def test_bytes_and_durations_have_readable_units():
    """Bytes use binary units, and long durations are in minutes."""
    assert format_bytes(637 * 2**20) == "637 MiB"
    assert format_bytes(1010 * 2**20) == "1010 MiB"
    assert format_bytes(999.7 * 2**20) == "1000 MiB"
    assert [format_duration(s) for s in (42, 185, 4320)] == ["42 s", "3 min 05 s", "1 h 12 min"]


@pytest.mark.parametrize(
    ("fraction", "text"), [(0.012, "1.2 %"), (0.0995, "10 %"), (27.02, "2702 %"), (0.0, "0 %"), (0.3333, "33 %")]
)
def test_per_cents_have_two_digits_or_all_before_the_point(fraction, text):
    """Per cents have two significant digits, or all digits before the decimal point, and never an exponent."""
    assert format_percent(fraction) == text
