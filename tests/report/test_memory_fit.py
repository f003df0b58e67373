"""Whether it fits is said first, with its range; then what that rests on, and what to change."""

from __future__ import annotations

import pytest

from lorameter.models.costs.memory import (
    MEASURED_ERRORS,
    MEASURED_ON,
    PEAK_RANGES,
    PUBLISHED_PEAKS,
    PUBLISHED_WITHIN,
)
from lorameter.report.terminal import text_of


@pytest.fixture(scope="module")
def said(every_report):
    """The documents about what fits, each as one line of text."""
    return {
        name: " ".join(text_of(document, width=5000, coloured=False).split())
        for name, document in every_report.items()
        if name.startswith("fit")
    }


@pytest.mark.parametrize(("name", "finding"), [
    ("fit", "On H200 141GB fits: needs"), ("fit that is none", "On RTX 5090 32GB does not fit: needs"),
    ("fit of nothing", "On 1GiB does not fit: needs"), ("fit here", "On Test [CPU] fits: needs"),
])  # fmt: skip
def test_the_finding_comes_first_with_its_range(said, name, finding):
    """And with how much is left or lacking at the end of the range that counts."""
    assert said[name].startswith(finding)
    assert ("or more are left" in said[name]) is ("does not" not in finding)
    assert ("or more are lacking" in said[name]) is ("does not" in finding)


def span(errors):
    """Both ends as a reader meets them: signed, with the sign that numbers have in a text."""
    least, greatest = (f"{error:+.1%}".replace("%", " %").replace("-", "−") for error in errors)
    return f"{least} to {greatest}"


def test_the_range_is_said_with_what_supports_it(said):
    """Of a GPU published peaks, of a CPU measured ones."""
    for name, text in said.items():
        on_card = name != "fit here"
        low, high = PEAK_RANGES["cuda" if on_card else "cpu"]
        assert f"Range: {span((low - 1, high - 1))} of the estimate." in text
        assert (f"{PUBLISHED_WITHIN} of {PUBLISHED_PEAKS} published peaks of GPUs lie within it" in text) is on_card
        assert (f"missed {MEASURED_ON} by {span(MEASURED_ERRORS)}" in text) is not on_card
        assert ("Assumed, and measured on no GPU: the driver keeps 2 % of the GPU" in text) is on_card
