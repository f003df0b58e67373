"""Tests of the live display: a row for each variant, ratios that become narrower, the remaining time with its basis,
and log lines."""

from __future__ import annotations

import dataclasses
import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from lorameter.records.record import Failure, TrialRecord
from lorameter.report import live
from lorameter.report.live import LiveDisplay
from lorameter.run.plan import make_plan


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
        trial=slot.trial, status=status, name=slot.variant.name, variant=slot.variant.id, role=slot.role,
        replicate=slot.replicate, position=slot.position, interleaving="replicates", seed=0, started_unix_s=0.0,
        wall_time_s=1.0, failure=failure, samples=samples, side=slot.side,
    )  # fmt: skip


def measured(plan, replicates):
    """Yield the records of the first replicates; nf4 takes twice as long."""
    for slot in plan.slots:
        if slot.replicate < replicates and "steps" in slot.measures:
            yield record_of(slot, (0.2 if slot.variant.name == "nf4" else 0.1) * (1 + 0.01 * slot.replicate))


def screen(display):
    """Return the lines of the current display."""
    out = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    out.print(display.picture())
    return out.file.getvalue().splitlines()


def test_each_variant_has_a_row_of_trials_value_ratio_and_phase(plan):
    """The control has a row, and a failed trial shows its status."""
    display = LiveDisplay(Console(file=io.StringIO(), width=100))
    display.starting(plan, "run-1")
    rows = [line.split() for line in screen(display)]
    assert rows[0] == ["trials", "last", "ratio", "so", "far", "now"]
    assert {row[0] for row in rows[1:4]} == {"plain", "nf4"}
    assert rows[3][:2] == ["plain", "(again)"]
    for record in measured(plan, 2):
        display.trial_ended(record)
    later = next(
        slot for slot in plan.slots if slot.replicate == 2 and (slot.variant.name, slot.role) == ("plain", "variant")
    )
    display.trial_phase(later, "turn")
    failed = next(slot for slot in plan.slots if slot.replicate == 2 and slot.variant.name == "nf4")
    display.trial_ended(record_of(failed, status="oom"))
    lines = "\n".join(screen(display))
    assert re.search(r"plain +\d+/\d+ +101 ms +timing", lines)
    assert re.search(r"nf4 +\d+/\d+ +oom +2\.0", lines)
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
