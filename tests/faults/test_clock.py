"""A clock that is set while something is measured: what took how long is the same, and nothing is lost or mistaken."""

from __future__ import annotations

import subprocess
import time

import pytest

YEAR_S = 365 * 24 * 3600


@pytest.mark.parametrize(
    "seconds", [-YEAR_S, *(pytest.param(seconds, marks=pytest.mark.faults) for seconds in (-3600, YEAR_S))]
)
def test_a_clock_that_is_set_under_way_changes_no_duration(seconds, command, only_run):
    """Of the trials under way, and of those after: none is negative, none is a year, the run is whole and read."""
    begin = time.monotonic()
    done = subprocess.run(command(stop=f"r1-a:turn:clock:{seconds}"), capture_output=True, text=True, check=False)
    took = time.monotonic() - begin
    assert done.returncode == 0, done.stderr
    run = only_run()
    assert (run.state, run.damaged_lines, run.measured_again) == ("complete", 0, 0)
    assert all(0 < record.wall_time_s <= took for record in run.records)
    jumps = {record.started_unix_s - run.records[0].started_unix_s for record in run.records if record.replicate == 2}
    assert all(abs(jump - seconds) <= took for jump in jumps), "it was set"
