"""Tests of compare_bytes: it compares maxima, without a test."""

import math

import pytest

from lorameter.stats import compare_bytes

GIB = 2**30


@pytest.mark.parametrize(
    ("candidate", "verdict"),
    [
        ([GIB, GIB], "equivalent"),
        ([GIB * 101 // 100], "equivalent"),
        ([GIB * 995 // 1000], "equivalent"),
        ([GIB * 102 // 100, GIB // 2], "regressed"),
        ([GIB * 98 // 100] * 5, "improved"),
    ],
)
def test_largest_peaks_are_compared(candidate, verdict):
    """Only the largest peak of each side counts, against the tolerance."""
    result = compare_bytes([GIB // 4, GIB, GIB // 2], candidate, tolerance=0.01)
    assert result.verdict == verdict
    assert result.ratio == result.low == result.high == max(candidate) / GIB


def test_zero_tolerance_is_exact():
    """Without tolerance one byte in a tebibyte decides, in both directions."""
    assert compare_bytes([2**40], [2**40 + 1], tolerance=0).verdict == "regressed"
    assert compare_bytes([2**40 + 1], [2**40], tolerance=0).verdict == "improved"


def test_zero_base():
    """Two peaks of zero are equal; any growth from zero is worse, without a ratio."""
    assert compare_bytes([0], [0], tolerance=0.1).ratio == 1.0
    grown = compare_bytes([0], [5], tolerance=0.1)
    assert (grown.verdict, grown.ratio, grown.low, grown.high) == ("regressed", None, None, None)
    assert compare_bytes([5], [0], tolerance=0.1).verdict == "improved"


@pytest.mark.parametrize(
    ("base", "candidate", "tolerance", "message"),
    [
        ([], [1], 0.1, "base has no samples"),
        ([1], [1, -2], 0.1, "candidate sample 1 is -2 bytes"),
        ([1, math.nan], [1], 0.1, "base sample 1 is nan"),
        ([[1]], [1], 0.1, "base is .*flat list"),
        ([1], [1], -0.1, "tolerance is -0.1"),
    ],
)
def test_bad_input_is_an_error(base, candidate, tolerance, message):
    """Bad input raises an error that names the offending value."""
    with pytest.raises(ValueError, match=message):
        compare_bytes(base, candidate, tolerance=tolerance)
