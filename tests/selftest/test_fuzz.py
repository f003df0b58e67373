"""Inputs that nobody should be able to do harm with, a few at each door; what ever failed, again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "benchmarks" / "selftest" / "fuzz.py"
CORPUS = ROOT / "tests" / "corpus"
DOORS = (
    "study policy requirements interpreter kernel variable records records-packed records-listed config gguf tokenizer "
    "weights cache manifest trials checks answer baselines benchmark compared kineto kineto-packed nsys nsys-packed "
    "table parquet saved template talk commands require"
).split()
SLOW = (
    "manifest",
    "trials",
    "checks",
    "benchmark",
    "gguf",
    "kernel",
    "tokenizer",
    "weights",
    "answer",
    "template",
    "saved",
)
"""Doors that do so much with an input that a few have to do."""


@pytest.mark.parametrize("name", DOORS)
def test_an_input_is_read_or_refused(name, program):
    """No traceback, no control character among what is shown, whatever is in it."""
    fuzz = program("fuzz")
    door = fuzz.DOORS[name]
    seeds = door.seeds()

    @settings(max_examples=8 if name in SLOW else 40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**32))
    def holds(number):
        content = fuzz.input_of(door, seeds, number, seed=0)
        assert fuzz.try_input(door, content) in ("read", "refused"), content[:2000]

    holds()


def test_every_door_is_tried(program):
    """One that is added is tried here too, and has a place in the corpus."""
    assert list(program("fuzz").DOORS) == DOORS
    assert {path.name for path in CORPUS.iterdir() if path.is_dir()} <= set(DOORS)


def test_what_ever_failed_is_read_or_refused_now():
    """Every file and every command line of the corpus, and some new ones, within 10 s and 1 GiB each."""
    done = subprocess.run(
        [sys.executable, PROGRAM, "--again", CORPUS, "--inputs", "0", "--lines", "4", "--seed", "7"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed" in done.stdout.splitlines()[-1]
    files = sum(path.is_file() for path in CORPUS.glob("*/*"))
    lines = len((CORPUS / "lines.jsonl").read_text(encoding="utf-8").splitlines())
    assert f"{files + lines} inputs" in done.stdout.splitlines()[0]


def test_a_failure_is_seen(program, monkeypatch):
    """A traceback, a control character, memory, time and a death: each is told, with the number of the input."""
    fuzz = program("fuzz")
    monkeypatch.setattr(fuzz, "MOST_S", 1.0)

    def enter(folder, content):
        what = int(content)
        if what == 0:
            raise KeyError("constructed")
        if what == 1:
            return "\x1b[2J"
        if what == 2:
            return str(len(bytearray(3 << 30)))
        if what == 3:
            signal.pause()
        if what == 4:
            os._exit(9)
        return "well"

    door = fuzz.Door(name="x", seeds=list, spoil=lambda source, content: content, enter=enter, share=1)
    told = fuzz.in_process(range(6), lambda number: fuzz.try_input(door, str(number).encode()))
    found = {number: said for number, said, _ in told}
    assert found[0].startswith("KeyError")
    assert "raw" in found[1]
    assert found[2] == "more than 1 GiB"
    assert found[3] == "more than 1 s"
    assert found[4] == "the process died"
    assert found[5] == "read"


def test_waits_for_a_processor_are_not_the_inputs(program, monkeypatch):
    """Others may have the processors for longer than an input may take; what it waits for itself counts."""
    fuzz = program("fuzz")
    waited = iter([0.0, 0.0, 7.0])
    monkeypatch.setattr(fuzz, "_waited_s", lambda pid: next(waited))
    now = iter([100.0, 109.0, 110.0])
    monkeypatch.setattr(fuzz.time, "monotonic", lambda: next(now))
    patience = fuzz.Patience(os.getpid())
    assert patience.spent_s() == 9.0
    assert patience.spent_s() == 3.0
