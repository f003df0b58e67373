"""A run under way: a grid that fills, ratios that narrow, the time left with its basis, and lines in a log."""

from __future__ import annotations

import dataclasses
import io
import re
import threading

import pytest
from rich.cells import cell_len
from rich.console import Console

from harness.records.record import Failure, TrialRecord
from harness.report import live
from harness.report.live import LiveDisplay
from harness.report.live_grid import Grid
from harness.run.plan import make_plan


@pytest.fixture
def plan(small_study):
    """Two variants and the control in five replicates."""
    protocol = dataclasses.replace(small_study.protocol, replicates=5)
    return make_plan(dataclasses.replace(small_study, protocol=protocol), phases=("train",))


def record_of(slot, step_s=None, status="ok"):
    """What became of a slot."""
    failure = Failure(phase="build", kind="X", message="no memory [/b]") if status != "ok" else None
    samples = {} if step_s is None else {"step_time_s": (step_s,) * 4, "step_cpu_time_s": (step_s / 2,) * 4}
    return TrialRecord(
        trial=slot.trial, status=status, name=slot.variant.name, variant=slot.variant.id, role=slot.role,
        replicate=slot.replicate, position=slot.position, interleaving="replicates", seed=0, started_unix_s=0.0,
        wall_time_s=1.0, failure=failure, samples=samples, side=slot.side,
    )  # fmt: skip


def measured(plan, replicates):
    """Records of the first so many replicates; nf4 takes twice as long."""
    for slot in plan.slots:
        if slot.replicate < replicates and "steps" in slot.measures:
            yield record_of(slot, (0.2 if slot.variant.name == "nf4" else 0.1) * (1 + 0.01 * slot.replicate))


def screen(display):
    """What is drawn now, line by line."""
    out = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    out.print(display.picture())
    return out.file.getvalue().splitlines()


def test_the_grid_has_a_cell_for_each_variant_and_replicate(plan):
    """Not begun, under way, measured with its value, failed with its status; the control is a row."""
    display = LiveDisplay(Console(file=io.StringIO(), width=100))
    display.starting(plan, "run-1")
    rows = [line.split() for line in screen(display)]
    assert rows[0] == ["1", "2", "3", "4", "5", "ratio", "so", "far"]
    assert [row[0] for row in rows[1:4]] == ["plain", "nf4", "plain"]
    assert rows[3][1] == "(again)"
    assert set(rows[1][1:]) == {"·"}
    for record in measured(plan, 1):
        display.trial_ended(record)
    later = next(
        slot for slot in plan.slots if slot.replicate == 1 and (slot.variant.name, slot.role) == ("plain", "variant")
    )
    display.trial_phase(later, "turn")
    failed = next(slot for slot in plan.slots if slot.replicate == 2 and slot.variant.name == "nf4")
    display.trial_ended(record_of(failed, status="oom"))
    lines = screen(display)
    assert re.search(r"plain +100 ms +▸ timing", lines[1])
    assert re.search(r"nf4 +200 ms +· +oom", lines[2])
    assert all(cell_len(line) <= 100 for line in lines)


def test_ratios_narrow_as_replicates_come(plan):
    """None with nothing to compare, a ratio with one, an interval from two on that gets no wider."""
    grid = Grid(plan)
    nf4, control = next(key for key in grid.rows if key[1] == "nf4"), grid.rows[-1]
    assert grid.ratio(nf4).line == ""
    widths = []
    for count in range(1, 6):
        for record in measured(plan, count):
            grid.end(record)
        cell = grid.ratio(nf4)
        assert cell.value == pytest.approx(2.0)
        widths.append(None if cell.low is None else cell.high - cell.low)
    assert widths[0] is None
    assert all(width < 0.01 for width in widths[1:])
    assert grid.ratio(control).value == pytest.approx(1.0)
    assert grid.ratio(grid.rows[0]).line == ""


def test_the_time_left_says_what_it_rests_on(plan, monkeypatch):
    """On what was expected at first, then on the trials so far; nothing where nothing is known."""
    clock = [1000.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    display = LiveDisplay(Console(file=io.StringIO(), width=100), device="a card", expected_s=600.0, basis="run x")
    display.starting(plan, "run-1")
    clock[0] += 60
    assert "a card" in screen(display)[-1]
    assert "about 9 min 00 s left, by run x" in screen(display)[-1]
    clock[0] += 600
    assert "longer than the 10 min 00 s of run x" in screen(display)[-1]
    for record in measured(plan, 1):
        display.trial_ended(record)
    ended = len({record.trial for record in measured(plan, 1)})
    assert f"left, by {ended} trials so far" in screen(display)[-1]
    unknown = LiveDisplay(Console(file=io.StringIO(), width=100))
    unknown.starting(plan, "run-1")
    assert screen(unknown)[-1] == f"0 of {len(plan.slots)} trials"


def test_the_time_left_is_no_more_than_the_limit_leaves(plan, monkeypatch):
    """Whatever all that is planned would take."""
    clock = [1000.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    protocol = dataclasses.replace(plan.study.protocol, max_minutes=8)
    limited = dataclasses.replace(plan, study=dataclasses.replace(plan.study, protocol=protocol))
    for expected_s in (7200.0, None):
        display = LiveDisplay(Console(file=io.StringIO(), width=100), expected_s=expected_s, basis="a rule of thumb")
        display.starting(limited, "run-1")
        clock[0] += 90
        assert "6 min 30 s left of 8 minutes" in screen(display)[-1]
        clock[0] += 900
        assert "0 s left of 8 minutes" in screen(display)[-1]
    short = LiveDisplay(Console(file=io.StringIO(), width=100), expected_s=60.0, basis="run x")
    short.starting(limited, "run-1")
    assert "about 1 min 00 s left, by run x" in screen(short)[-1]


def test_surroundings_are_said_while_they_disturb(plan):
    """By the kinds of what was seen, with how many trials each met."""
    display = LiveDisplay(Console(file=io.StringIO(), width=100))
    display.starting(plan, "run-1")
    slot = plan.slots[0]
    display.trial_ended(record_of(slot, 0.1).replaced(values={"psi_cpu_some_share_train": 0.5, "threads": 2.0}))
    before = screen(display)[-1]
    display._grid.disturbed["contended"] = 2
    assert "surroundings: contended in 2" in screen(display)[-1]
    assert before != screen(display)[-1]


@pytest.fixture
def heard(plan, monkeypatch):
    """The lines of five minutes of one trial without a terminal."""

    def listen(**expected):
        clock, out = [1000.0], io.StringIO()
        monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
        with LiveDisplay(Console(file=out, width=200), **expected) as display:
            display.starting(plan, "run-1")
            for _ in range(300):
                clock[0] += 1
                display.trial_phase(plan.slots[0], "turn")
        return out.getvalue().splitlines()

    return listen


def test_without_a_terminal_a_time_that_nobody_knows_leaves_no_mark(heard):
    """As on a card where this study has never run."""
    lines = heard()
    assert lines[0].endswith("starting the worker")
    assert [line.partition("steps, ")[2] for line in lines[1:]] == [
        f"after {number} min 00 s" for number in range(1, 6)
    ]


def test_without_a_terminal_a_long_replicate_is_heard_of(heard):
    """A line a trial; where none ends for a minute, what is going on and since when."""
    lines = heard(expected_s=2160.0, basis="a rule of thumb")
    assert lines[0].endswith("starting the worker; about 36 min 00 s left, by a rule of thumb")
    assert len(lines) == 1 + 5
    assert re.match(r"replicate 1/5  \w+.*: timing steps, after 1 min 00 s; about 35 min 00 s left", lines[1])


def test_nothing_is_drawn_more_often_than_ten_times_a_second(plan, monkeypatch):
    """Turns of a tiny model take milliseconds; a new phase is shown at once."""
    clock = [1000.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    drawn = []
    display = LiveDisplay(Console(file=io.StringIO(), width=100, force_terminal=True))
    monkeypatch.setattr(display._live, "update", lambda picture, refresh: drawn.append(clock[0]))
    display.starting(plan, "run-1")
    for _ in range(100):
        clock[0] += 0.005
        display.trial_phase(plan.slots[0], "turn")
    assert len(drawn) <= 2 + 0.5 / live.LEAST_BETWEEN_S + 1
    display.trial_phase(plan.slots[0], "verify")
    assert drawn[-1] == clock[0]


def test_no_thread_draws_beside_a_measurement(plan):
    """What is shown changes where the runner says something, and nowhere else."""
    before, out = threading.enumerate(), io.StringIO()
    with LiveDisplay(Console(file=out, width=100, force_terminal=True)) as display:
        display.starting(plan, "run-1")
        assert threading.enumerate() == before
        assert "ratio so far" in out.getvalue()


def test_many_replicates_show_the_latest_and_fit(small_study):
    """What is under way is in sight at 80 columns, whatever the number."""
    protocol = dataclasses.replace(small_study.protocol, replicates=40)
    plan = make_plan(dataclasses.replace(small_study, protocol=protocol), phases=("train",))
    display = LiveDisplay(Console(file=io.StringIO(), width=80))
    display.starting(plan, "run-1")
    late = next(slot for slot in plan.slots if slot.replicate == 30)
    display.trial_phase(late, "turn")
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    console.print(display.picture())
    lines = console.file.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= 80
    assert "31" in lines[0].split()
    assert any("▸ timing" in line for line in lines)
