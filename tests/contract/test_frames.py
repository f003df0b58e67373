"""Tests of the tables of `load` and `load_all`: columns, types, and row counts of a stored run."""

import json

import pytest

from tests.contract import doors
from tests.contract.expected import check_document

TABLES = ("trials", "samples", "estimates", "comparisons")


def columns(frames):
    return {name: {key: str(kind) for key, kind in getattr(frames, name).dtypes.items()} for name in TABLES}


def test_columns_of_a_run():
    """A run is loaded by its id and a folder, or by its path."""
    frames = doors.load("base", "runs")
    check_document("frames/columns", columns(frames))
    rows = {name: len(getattr(frames, name)) for name in TABLES}
    assert {name: len(getattr(doors.load("runs/base"), name)) for name in TABLES} == rows
    check_document("frames/rows", rows)


def test_values_are_those_of_the_records():
    """Durations are bit-equal to the records, and missing values are missing."""
    lines = (doors.HERE / "runs" / "base" / "trials.jsonl").read_text(encoding="utf-8").splitlines()
    records = {record["trial"]: record for record in map(json.loads, lines)}
    samples = doors.load("base", "runs").samples
    for trial, of_trial in samples[samples.metric == "step_time_s"].groupby("trial"):
        assert of_trial.sort_values("sample").value.tolist() == records[trial]["samples"]["step_time_s"]
    assert doors.load("base", "runs").trials.failure.isna().all()


def test_all_runs_of_a_folder():
    """The columns are the same, and unreadable runs are named."""
    every = doors.load_all("runs")
    assert columns(every) == columns(doors.load("base", "runs"))
    assert set(every.trials["run"]) == {"base", "candidate"}
    assert len(every.unreadable) == 0
    assert len(doors.load_all("damaged").unreadable) == 1


def test_a_run_that_is_not_there():
    """The error names the run."""
    with pytest.raises(Exception, match="no-such-run"):
        doors.load("no-such-run", "runs")
