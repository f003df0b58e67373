"""Tests that a run can be reported at any moment: its state comes first, and missing data causes no error."""

from __future__ import annotations

import dataclasses
import io
import json

import msgspec
import pytest
from rich.console import Console

from lorameter.records import store
from lorameter.records.record import UNDER_WAY, Failure
from lorameter.report.run import describe_run
from lorameter.report.run_view import view_of
from lorameter.report.terminal import show
from lorameter.verdicts.ab import report_of

STEPS = {"plain": [0.1, 0.1, 0.1], "nf4": [0.2, 0.2, 0.2]}


@pytest.fixture
def broken_off(write_run, tmp_path):
    """A function that writes a run of nine trials with the given number of records, the last one under way."""

    def make(records, status="running", **changes):
        path = write_run("run", STEPS, status=status)
        lines = (path / "trials.jsonl").read_text().splitlines(keepends=True)
        lines.sort(key=lambda line: json.loads(line)["replicate"])
        (path / "trials.jsonl").write_text("".join(lines[:records]))
        run = store.read_run("run", tmp_path / "runs")
        if run.records:
            failure = Failure(phase="turn", kind=UNDER_WAY, message="under way when this was written, after turn")
            last = max(run.records, key=lambda record: (record.replicate, record.position))
            under_way = last.replaced(status="interrupted", failure=failure)
            run = dataclasses.replace(run, records=tuple(under_way if one is last else one for one in run.records))
        return dataclasses.replace(run, **changes)

    return make


def text_of(run):
    """Return the report as printed."""
    buffer = io.StringIO()
    show(describe_run(view_of(run)), Console(file=buffer, width=240))
    return buffer.getvalue()


def test_a_killed_run_shows_its_progress_and_the_resume_command(broken_off):
    """Only complete replicates count; the trial under way is named, and the command that resumes the run."""
    text = text_of(broken_off(5))
    assert "1 of 3 replicates complete" in text
    assert "status    its process was killed; 4 of 9 trials have ended" in text
    assert "Resume: lorameter run --resume run" in text
    assert "interrupted in turn: under way when this was written" in text
    assert "no record (the run is killed)" in text
    assert "This run is not complete (killed)" in text
    assert text.startswith("INVALID: its status is 'running', not 'complete'; 4 planned trials without a record")
    assert "Trials: none yet" in text_of(broken_off(0))


def test_a_run_under_way_is_not_taken_for_a_killed_one(broken_off):
    """A process holds its lock, so that there is nothing to resume."""
    text = text_of(broken_off(5, live=True))
    assert "status    under way: a process is measuring it; 4 of 9 trials" in text
    assert "--resume" not in text


def test_an_ab_that_broke_off_is_reported_too(write_run, tmp_path):
    """With no trial, and with one side only, the verdicts are invalid and the report does not fail."""
    path = write_run("run", STEPS, status="running")
    run = store.read_run("run", tmp_path / "runs")
    sides = {side: {"label": side, "declared": [], "worker": None, "facts": None} for side in ("base", "candidate")}
    manifest = msgspec.structs.replace(run.manifest, sides=sides)
    for records in ((), tuple(record.replaced(side="base") for record in run.records)):
        report = report_of(dataclasses.replace(run, path=path, manifest=manifest, records=records))
        assert {row.verdict for row in report.comparisons} <= {"invalid"}
