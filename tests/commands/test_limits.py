"""Tests of the time limit and of `--if-busy` as options: of a dry run, and of a command that measures several runs."""

from __future__ import annotations

import pytest

from lorameter.cli import main
from lorameter.errors import LorameterError
from lorameter.run import forecast


def test_a_limit_that_does_not_fit_is_refused_by_the_dry_run(tmp_path, capsys):
    """The error has the minutes that are needed."""
    words = ["run", "training-step", "--dry-run", "--runs-dir", str(tmp_path / "runs")]
    assert main([*words, "--max-minutes", "0.001"]) == 2
    assert "not even one fits" in capsys.readouterr().err


def test_the_limit_is_no_estimate_of_the_time(tmp_path, capsys, monkeypatch):
    """If no step can be timed, the time of a run is unknown."""
    monkeypatch.setattr(forecast, "time_steps", lambda plan, executor, if_busy: "no step can be timed")
    words = ["run", "training-step", "--dry-run", "--runs-dir", str(tmp_path / "runs")]
    assert main([*words, "--max-minutes", "12"]) == 0
    assert "time    unknown (no step can be timed)" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "expected"), [("share", "share"), ("wait", "refuse"), ("refuse", "refuse")])
def test_a_dry_run_times_steps_on_a_busy_device_only_if_it_may_share_it(tmp_path, monkeypatch, option, expected):
    """It never waits for an estimate."""
    asked = []
    monkeypatch.setattr(forecast, "time_steps", lambda plan, executor, if_busy: asked.append(if_busy) or "none")
    words = ["run", "training-step", "--dry-run", "--runs-dir", str(tmp_path / "runs")]
    assert main([*words, "--if-busy", option]) == 0
    assert asked == [expected]


def test_the_limit_of_a_calibration_is_of_all_its_runs(tmp_path, monkeypatch):
    """Two pilots of three replicates and 24 replicates share it."""
    limits = []

    def measure(study, *_, **__):
        limits.append(study.protocol.max_minutes)
        raise LorameterError("stop")

    monkeypatch.setattr("lorameter.commands.calibrate.measure_study", measure)
    words = ["calibrate", "--max-minutes", "10", "--runs-dir", str(tmp_path / "runs")]
    for more in ([], ["--inject-rows", "100"]):
        assert main([*words, *more]) == 70
    assert limits == [1.0, 10.0]
