"""Tests of energy as a difference of a counter, where the difference is meaningful."""

from __future__ import annotations

import pytest

from lorameter.machine.reading import Reading, missing
from lorameter.machine.telemetry import energy_between


def test_energy_is_the_difference():
    """The energy is in joules."""
    assert energy_between(Reading(value=1000.0), Reading(value=1900.5), 3.0) == Reading(value=900.5)


@pytest.mark.parametrize(
    ("first", "last", "seconds", "words"),
    [
        (Reading(value=5000.0), Reading(value=12.0), 3.0, "went back from 5000.000 to 12.000 J"),
        (Reading(value=1.0), Reading(value=2.0), 0.3, "0.30 s were measured"),
        (Reading(value=1.0), Reading(value=1.0), 3.0, "stood still"),
        (missing("not offered"), Reading(value=2.0), 3.0, "not offered"),
        (Reading(value=1.0), missing("GPU lost"), 3.0, "GPU lost"),
    ],
)
def test_unusable_energy_readings_give_no_energy(first, last, seconds, words):
    """A reset, too few counter updates, a constant counter and a missing reading give no energy."""
    found = energy_between(first, last, seconds)
    assert found.value is None
    assert words in found.reason
