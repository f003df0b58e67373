"""Tests of measuring time, which does not count pauses and is robust to clock changes."""

import pytest

from lorameter.records.record import TrialRecord
from lorameter.records.store import measuring_time_s


def record(started_unix_s, wall_time_s):
    return TrialRecord(
        trial="r0-a", status="ok", name="a", variant="v", role="variant", replicate=0, position=0, seed=0,
        interleaving="replicates", started_unix_s=started_unix_s, wall_time_s=wall_time_s,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [
        ([(100.0, 10.0), (110.0, 10.0)], 20.0),  # one after the other
        ([(100.0, 30.0), (102.0, 27.0), (101.0, 30.0)], 31.0),  # taking turns
        ([(100.0, 10.0), (99_110.0, 10.0)], 20.0),  # resumed after a day
        ([(100.0, 10.0), (5.0, 10.0)], 20.0),  # the clock was set back
        ([(100.0, 30.0), (9e8, 29.0)], 59.0),  # the clock was set forward while they took turns
        ([(0.0, 0.0), (100.0, 10.0)], 10.0),  # one that never started
        ([], 0.0),
    ],
)
def test_seconds_under_way(spans, seconds):
    """Overlapping trials count each moment once."""
    assert measuring_time_s([record(*span) for span in spans]) == pytest.approx(seconds)
