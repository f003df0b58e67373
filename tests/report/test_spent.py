"""What the time of a run went to, for people and for programs."""

from __future__ import annotations

import pytest

from harness.records.spending import Allocation, Spending
from harness.report.spent import describe_spending, encode_spending
from harness.report.table import Fold

SPENDING = Spending(
    wall_s=480.0, limit_s=480.0, measured_s={"steps": 150.0, "requests": 60.0, "cold": 90.0},
    allocations=(
        Allocation(replicate=0, turns=2, steps_per_turn=1, planned=8),
        Allocation(replicate=1, turns=12, steps_per_turn=2, planned=8, optimum=11.0),
    ),
)  # fmt: skip


def test_the_share_of_measurement_is_said_in_a_line_and_in_full():
    """With its parts, and the turns that each replicate took."""
    title, fold = describe_spending(SPENDING)
    assert title.title == "Time"
    assert isinstance(fold, Fold)
    assert "8 min 00 s of 8 min 00 s, 62 % of it measurement" in fold.summary.text
    said = [line.text for line in fold.lines]
    assert "timed steps 2 min 30 s, requests 1 min 00 s, cold starts 1 min 30 s" in said[0]
    assert said[1] == "replicate 1: 2 of 8 planned turns, 1 step each"
    assert said[2].startswith("replicate 2: 12 of 8 planned turns, 2 steps each; 11 would narrow")


def test_programs_are_told_the_same():
    """In seconds; nothing of a run that does not say it."""
    assert encode_spending(SPENDING)["time"] == {
        "limit_s": 480.0, "wall_s": 480.0, "measured_s": SPENDING.measured_s, "measured_share": pytest.approx(0.625),
        "turns": [2, 12],
    }  # fmt: skip
    assert encode_spending(None) == {}
    assert list(describe_spending(None)) == []
