"""Tests of the report of whether a variant fits: first the finding with its range, then the basis and what to
change."""

from __future__ import annotations

import pytest

from lorameter.report.terminal import text_of


@pytest.fixture(scope="module")
def said(every_report):
    """The documents about the fit, each as one line of text."""
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
    """The finding also has the spare or missing memory at the end of the range that decides."""
    assert said[name].startswith(finding)
    assert ("or more are left" in said[name]) is ("does not" not in finding)
    assert ("or more are lacking" in said[name]) is ("does not" in finding)
