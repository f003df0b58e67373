"""Tests of damaged runs: each is refused by name, and commands on other runs work."""

from __future__ import annotations

import json

import pytest

from lorameter.cli import main
from lorameter.errors import UsageError
from lorameter.records.store import read_run
from lorameter.run.forecast import measured_peaks

DAMAGES = {
    "null": "null",
    "deeper": "[" * 100_000,
    "schema": '{"schema": {"a": 1}}',
}


@pytest.fixture
def path(write_run):
    """A valid run."""
    return write_run("mine", {"plain": [1.0] * 5, "nf4": [1.1] * 5})


@pytest.mark.parametrize("content", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_manifest_stops_nothing_else(content, path, write_run, machine, capsys, small_study):
    """The list of runs and a forecast work; the run itself is refused."""
    write_run("other", {"plain": [1.0] * 5, "nf4": [1.1] * 5}, peak=2**20)
    (path / "manifest.json").write_text(content)
    with pytest.raises(UsageError, match=r"manifest\.json"):
        read_run("mine", path.parent)
    assert main(["list", "runs", "--runs-dir", str(path.parent)]) == 0
    assert any("mine" in line and "damaged" in line for line in capsys.readouterr().out.splitlines())
    assert measured_peaks(small_study.workload, machine, path.parent, "host_peak_train_bytes")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("sides",), {"base": {"label": "x", "worker": "y"}}),
        (("study", "replaced"), {"workload.no": 1}),
        (("study", "workload"), 1),
        (("study", "title"), None),
        (("study", "title"), "mine\n::error::forged"),
        (("run",), "mine\r::error::forged"),
        (("order",), ["r0-plain", "r0\n::error::forged"]),
    ],
    ids=str,
)
def test_a_table_of_another_form_is_refused(place, value, path, capsys):
    """The command exits with 2 and names the key."""
    document = json.loads((path / "manifest.json").read_text())
    table = document
    for key in place[:-1]:
        table = table[key]
    table[place[-1]] = value
    (path / "manifest.json").write_text(json.dumps(document))
    assert main(["report", "mine", "--runs-dir", str(path.parent)]) == 2
    assert place[-1] in capsys.readouterr().err


def test_unknown_facts_of_a_machine_are_reported_as_unknown(path, capsys):
    """A manifest without provenance is read, with its facts unknown."""
    document = json.loads((path / "manifest.json").read_text())
    document["provenance"] = {}
    (path / "manifest.json").write_text(json.dumps(document))
    assert main(["report", "mine", "--runs-dir", str(path.parent)]) == 0
    assert "unknown" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        {"wall_time_s": "NaN"},
        {"started_unix_s": "Infinity"},
        {"samples": {"step_time_s": [1.0, "Infinity"]}},
        {"samples": {"step_time_s": [1e308] * 3}},
        {"samples": {"step_time_s": [0.0, 1.0, 2.0]}},
        {"tokens": {"x": {"y": 1}}},
    ],
    ids=str,
)
def test_a_record_that_no_trial_could_leave_is_refused(change, path):
    """The error names the trial, or the run is reported as invalid, without a traceback."""
    lines = [json.loads(line) for line in (path / "trials.jsonl").read_text().splitlines()]
    lines[0] |= change
    (path / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", "mine", "--runs-dir", str(path.parent)]) in (2, 4)
