"""A clock that is set while something is measured: what took how long is the same, and nothing is lost or mistaken."""

from __future__ import annotations

import json
import os
import subprocess
import time

import pytest

from harness.records import store
from harness.run.executors import environments

YEAR_S = 365 * 24 * 3600


@pytest.mark.parametrize(
    "seconds", [-YEAR_S, 3600, *(pytest.param(seconds, marks=pytest.mark.faults) for seconds in (-3600, YEAR_S))]
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


@pytest.mark.parametrize("seconds", [-YEAR_S, pytest.param(YEAR_S, marks=pytest.mark.faults)])
def test_a_run_is_gone_on_with_at_another_time(seconds, command, stopped, only_run, resumed):
    """It broke off under the one clock and is whole under the other."""
    with stopped(command(stop="r1-a:turn")) as process:
        process.kill()
        process.communicate()
    earlier = [record for record in only_run().records if record.replicate == 0]
    words = command("run", "--resume", only_run().manifest.run, "--json", stop=f"r1-a:prepare:clock:{seconds}")
    assert subprocess.run(words, capture_output=True, check=False).returncode == 0
    whole = resumed()
    assert (whole.state, len(whole.records)) == ("complete", len(whole.manifest.order))
    assert [record for record in whole.records if record.replicate == 0] == earlier


def test_a_clock_that_stands_still_gives_no_name_twice(tmp_path, monkeypatch):
    """The name of a run is of nothing that is there, even where the same second and the same chance come again."""
    monkeypatch.setattr(store.time, "strftime", lambda form: "20260131-093000")
    drawn = iter(["aaaa", "aaaa", "bbbb"])
    monkeypatch.setattr(store.secrets, "token_hex", lambda count: next(drawn))
    (tmp_path / store.new_run_id("s", tmp_path)).mkdir()
    assert store.new_run_id("s", tmp_path) == "20260131-093000-s-bbbb"


def test_an_environment_that_is_in_use_is_never_too_old(tmp_path, monkeypatch):
    """By a clock that was wrong when it was taken, or in an A/B of weeks: another A/B removes only what nobody uses."""
    built = []

    def build(requirements, out, report):
        (out / "bin").mkdir(parents=True)
        (out / environments.DESCRIPTION_FILE).write_text(json.dumps({}))
        built.append(requirements)

    monkeypatch.setattr(environments, "_build", build)
    used = environments.layered_environment(["used"], tmp_path, report=print)
    with environments.in_use(used):
        os.utime(used.parents[1] / environments.DESCRIPTION_FILE, (0, 0))
        environments.layered_environment(["another"], tmp_path, report=print)
        assert used.parents[1].is_dir()
    environments.layered_environment(["another"], tmp_path, report=print)
    assert not used.parents[1].is_dir()
    assert len(built) == 2
