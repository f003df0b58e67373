"""Tests of baselines: an accepted valid run, stored for its fingerprint and study."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lorameter.cli import main
from lorameter.verdicts.baselines import read_baselines

BASE = {"plain": [0.100, 0.101, 0.099, 0.1005], "nf4": [0.200, 0.201, 0.199, 0.2005]}
FAST = {name: [time / 1.2 for time in times] for name, times in BASE.items()}


@pytest.fixture
def lorameter(tmp_path, capsys):
    """A function that runs a command with --json and returns its exit code with its document or message."""

    def run(*arguments):
        code = main([*map(str, arguments), "--json", "--runs-dir", str(tmp_path / "runs")])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if captured.out else captured.err

    return run


def test_the_accepted_run_is_the_base(write_run, lorameter):
    """`baseline` is the accepted run and not a newer one; accepting another replaces it and says so."""
    write_run("a", BASE)
    write_run("b", FAST)
    code, document = lorameter("accept", "a")
    assert code == 0
    assert document["accepted"]["run"] == "a"
    assert document["accepted"]["study"] == "small"
    assert document["replaced"] is None
    write_run("c", BASE)
    code, document = lorameter("compare", "baseline", "c")
    assert code == 3
    assert document["base"] == "a"
    assert lorameter("accept", "b")[1]["replaced"]["run"] == "a"
    assert lorameter("compare", "baseline", "a")[1]["base"] == "b"


def test_each_fingerprint_and_study_has_its_own_baseline(write_run, lorameter, small_study, tmp_path):
    """A run of another machine or study neither replaces a baseline nor is compared with it."""
    write_run("a", BASE)
    write_run("b", BASE, facts={"device_name": "Other CPU"})
    write_run("c", BASE, study=dataclasses.replace(small_study, name="other"))
    for run in ("a", "b"):
        assert lorameter("accept", run)[1]["replaced"] is None
    for run in ("a", "b"):
        assert lorameter("compare", "baseline", run)[1]["base"] == run
    assert lorameter("compare", "baseline", "c")[0] == 5
    assert len(read_baselines(tmp_path / "runs").baselines) == 2


def test_no_baseline_is_exit_5(write_run, lorameter):
    """Every comparison has the verdict no_baseline, with the command that accepts one."""
    write_run("a", BASE)
    code, document = lorameter("compare", "baseline", "a")
    assert code == 5
    assert {row["verdict"] for row in document["comparisons"]} == {"no_baseline"}
    assert {row["variant"] for row in document["comparisons"]} == {"plain", "nf4"}
    assert "lorameter accept RUN" in document["comparisons"][0]["reason"]


def oom(record):
    return record.replaced(status="oom") if record.trial == "r1-nf4" else record


@pytest.mark.parametrize(("options", "said"), [
    ({"control": 1.3}, "control regressed"),
    ({"status": "interrupted"}, "interrupted"),
    ({"change": oom}, "r1-nf4 is oom"),
])  # fmt: skip
def test_an_invalid_run_is_not_accepted(write_run, lorameter, tmp_path, options, said):
    """The command exits with 4 and the reason, and the earlier baseline stays."""
    write_run("a", BASE)
    write_run("b", BASE, **options)
    lorameter("accept", "a")
    code, text = lorameter("accept", "b")
    assert code == 4
    assert said in text
    assert [baseline.run for baseline in read_baselines(tmp_path / "runs").baselines] == ["a"]


def test_a_run_in_another_folder_is_refused(write_run, lorameter, tmp_path):
    """A run in another folder is refused, since its baseline would not be found there; the remedy names the folder."""
    elsewhere = tmp_path / "elsewhere" / "a"
    elsewhere.parent.mkdir()
    write_run("a", BASE).rename(elsewhere)
    code, text = lorameter("accept", elsewhere)
    assert code == 2
    assert f"--runs-dir {elsewhere.parent}" in text


def test_a_baseline_that_was_deleted_is_an_error_and_no_pass(write_run, lorameter):
    """A missing baseline exits with 2 and does not count as a missing comparison."""
    path = write_run("a", BASE)
    write_run("b", BASE)
    lorameter("accept", "a")
    path.rename(path.with_name("moved"))
    code, text = lorameter("compare", "baseline", "b")
    assert code == 2
    assert "accepted baseline cannot be read" in text


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 2}', '{"schema": 1, "baselines": [{"run": "a"}]}'])
def test_a_damaged_file_is_refused_and_left_alone(write_run, lorameter, tmp_path, text):
    """A damaged file is neither read as empty nor overwritten."""
    write_run("a", BASE)
    path = tmp_path / "runs" / "baselines.json"
    path.write_text(text)
    assert lorameter("accept", "a")[0] == 2
    assert lorameter("compare", "baseline", "a")[0] == 2
    assert path.read_text() == text
