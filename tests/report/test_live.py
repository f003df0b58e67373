"""Tests of the live display: a row for each variant, the remaining time with its basis, and log lines.

Tests that a run can be reported at any moment: its state comes first, and missing data causes no error.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re

import msgspec
import pytest
from rich.cells import cell_len
from rich.console import Console

from lorameter.records import store
from lorameter.records.record import UNDER_WAY, Failure, TrialRecord
from lorameter.report import live
from lorameter.report.live import LiveDisplay
from lorameter.report.run import describe_run
from lorameter.report.run_view import make_run_view
from lorameter.report.terminal import show
from lorameter.run.plan import make_plan
from lorameter.verdicts.ab import build_report


@pytest.fixture
def plan(small_study):
    """A plan of two variants and the control with five replicates."""
    protocol = dataclasses.replace(small_study.protocol, replicates=5)
    return make_plan(dataclasses.replace(small_study, protocol=protocol), phases=("train",))


def record_of(slot, step_s=None, status="ok"):
    """Return the record of a slot."""
    failure = Failure(phase="build", kind="X", message="no memory [/b]") if status != "ok" else None
    samples = {} if step_s is None else {"step_time_s": (step_s,) * 4, "step_cpu_time_s": (step_s / 2,) * 4}
    return TrialRecord(
        trial=slot.trial, status=status, name=slot.variant.name, variant=slot.variant.id, role=slot.arm.role,
        replicate=slot.replicate, position=slot.position, interleaving="replicates", seed=0, started_unix_s=0.0,
        wall_time_s=1.0, failure=failure, samples=samples, side=slot.arm.side,
    )  # fmt: skip


def measured(plan, replicates):
    """Yield the records of the first replicates; nf4 takes twice as long."""
    for slot in plan.slots:
        if slot.replicate < replicates and "steps" in slot.measures:
            yield record_of(slot, (0.2 if slot.variant.name == "nf4" else 0.1) * (1 + 0.01 * slot.replicate))


def screen(display):
    """Return the lines of the current display."""
    out = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    out.print(display.render())
    return out.file.getvalue().splitlines()


def test_each_variant_has_a_row_of_trials_value_and_phase(plan):
    """The control has a row, and a failed trial shows its status."""
    display = LiveDisplay(Console(file=io.StringIO(), width=100))
    display.starting(plan, "run-1")
    rows = [line.split() for line in screen(display)]
    assert rows[0] == ["trials", "last", "ratio", "now"]
    assert {row[0] for row in rows[1:4]} == {"plain", "nf4"}
    assert rows[3][:2] == ["plain", "(control)"]
    for record in measured(plan, 2):
        display.trial_ended(record)
    later = next(
        slot
        for slot in plan.slots
        if slot.replicate == 2 and (slot.variant.name, slot.arm.role) == ("plain", "variant")
    )
    display.trial_phase(later, "turn")
    failed = next(slot for slot in plan.slots if slot.replicate == 2 and slot.variant.name == "nf4")
    display.trial_ended(record_of(failed, status="oom"))
    lines = "\n".join(screen(display))
    assert re.search(r"plain +\d+/\d+ +101 ms +timing", lines)
    assert re.search(r"nf4 +\d+/\d+ +oom", lines)
    assert all(cell_len(line) <= 100 for line in screen(display))


def test_the_remaining_time_is_shown_with_its_basis(plan, monkeypatch):
    """The estimate is based on the completed trials and is missing before the first one."""
    clock = [1000.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    display = LiveDisplay(Console(file=io.StringIO(), width=100), device="a GPU")
    display.starting(plan, "run-1")
    clock[0] += 60
    assert screen(display)[-1] == f"0 of {len(plan.slots)} trials; a GPU"
    for record in measured(plan, 1):
        display.trial_ended(record)
    ended = len({record.trial for record in measured(plan, 1)})
    assert f"left, by {ended} trials so far" in screen(display)[-1]


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
    show(describe_run(make_run_view(run)), Console(file=buffer, width=240))
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


def test_an_interrupted_ab_is_reported_too(write_run, tmp_path):
    """With no trial, and with one side only, the verdicts are invalid and the report does not fail."""
    path = write_run("run", STEPS, status="running")
    run = store.read_run("run", tmp_path / "runs")
    sides = {side: {"label": side, "declared": [], "worker": None, "facts": None} for side in ("base", "candidate")}
    manifest = msgspec.structs.replace(run.manifest, sides=sides)
    for records in ((), tuple(record.replaced(side="base") for record in run.records)):
        report = build_report(dataclasses.replace(run, path=path, manifest=manifest, records=records))
        assert {row.verdict for row in report.comparisons} <= {"invalid"}
