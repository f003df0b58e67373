"""Tests of the history of runs with known numbers: lines, breaks and suspected changes."""

import dataclasses
import math
import random

import msgspec
import pytest

from lorameter.records import codec, store
from lorameter.records.fileio import write_document
from lorameter.report.history import describe_history
from lorameter.report.terminal import render_text
from lorameter.results.history import MeasuredRun, Moment, confirm_command, read_history

DAY_S = 86400.0


@pytest.fixture
def nightly(write_run, small_study):
    """A function that writes a run for each night: `levels` are true step times, `facts` the differences between
    nights."""
    study = dataclasses.replace(small_study, name="training-step")
    rng = random.Random(4)

    def write(levels, facts=lambda night: {}, **options):
        for night, level in enumerate(levels):
            value = level * math.exp(rng.gauss(0, 0.02))
            found = {"git": {"commit": f"{night:040x}", "dirty": False}} | facts(night)
            path = write_run(f"night{night:03d}", {"plain": [value, value * 1.01]}, study=study, facts=found, **options)
            dated(path, night)
        return path.parent

    return write


def dated(path, night, **changes):
    data = codec.to_json(store.read_manifest(path)) | {"created_unix_s": night * DAY_S + 1.79e9} | changes
    write_document(path / "manifest.json", data)


def torch(version):
    return {"libraries": {"torch": version, "transformers": "1.0", "peft": "1.0", "bitsandbytes": "1.0"}}


def test_a_slow_down_is_suspected_with_all_that_is_known_of_it(nightly):
    """The suspected change has the runs before and after, the interval, the commits, and the command that would confirm
    it."""
    runs = nightly([1.0] * 14 + [1.1] * 6)
    (track,) = read_history(runs).tracks
    (line,) = track.lines
    (found,) = line.suspicions
    assert (found.before.run, found.after.run) == ("night013", "night014")
    assert found.direction == "slower"
    assert found.low < 1.1 < found.high
    assert found.level_after / found.level_before == pytest.approx(found.ratio)
    assert [(one.field, one.base[-2:], one.candidate[-2:]) for one in found.differing] == [("git.commit", "0d", "0e")]
    assert found.confirm == ("lorameter ab training-step --base 000000000000 --candidate 000000000000 --variant plain")
    assert [plateau.runs for plateau in line.plateaus] == [14, 6]
    assert not track.breaks


def test_a_change_of_fingerprint_is_a_known_break_not_a_change(nightly):
    """Each fingerprint has its own line without a ratio across; the break has the differences and the A/B of the
    versions that measures it. The report has the levels of each line, and a row for each run."""
    runs = nightly([1.0] * 12 + [1.3] * 12, lambda night: torch("1.0" if night < 12 else "2.0+cpu"))
    (track,) = read_history(runs).tracks
    assert [len(line.moments) for line in track.lines] == [12, 12]
    assert not [line.suspicions for line in track.lines if line.suspicions]
    (change,) = track.breaks
    assert change.fingerprint_before != change.fingerprint_after
    assert {one.field for one in change.differing} == {"git.commit", "libraries.torch"}
    assert change.confirm.endswith("--base torch==1.0 --candidate torch==2.0 --variant plain")
    assert not hasattr(change, "ratio")
    text = said(read_history(runs), every_run=True)
    assert len([line for line in text.splitlines() if line.startswith("2026") and " 12 " in line]) == 2
    assert "known break" in text
    assert "torch 1.0 → 2.0+cpu" in text
    assert text.count("night0") >= 24


def test_runs_that_do_not_count_are_gaps_with_their_reason(nightly):
    """An interrupted run with twice the time is not a change."""
    runs = nightly([1.0] * 14)
    for night in (11, 12, 13):
        dated(runs / f"night{night:03d}", night, status="interrupted")
    history = read_history(runs)
    line = history.tracks[0].lines[0]
    assert len(line.counting) == 11
    assert "interrupted" in line.moments[-1].why_not
    text = said(history, width=80, every_run=True)
    assert "night013 does not count: " in text
    (row,) = [one for one in text.splitlines() if "  night013  " in one]
    assert "s not counted" in row


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({"commit": "a" * 40}, {"commit": "b" * 40}, "--base aaaaaaaaaaaa --candidate bbbbbbbbbbbb"),
        ({"commit": "a" * 40}, {"commit": "b" * 40, "dirty": True}, ""),
        ({"commit": "a" * 40}, {"commit": "a" * 40}, ""),
        ({"commit": None}, {"commit": "b" * 40}, ""),
        (
            {"versions": {"torch": "1", "peft": "0.1"}},
            {"versions": {"torch": "2", "peft": "0.2"}},
            "--base 'torch==1 peft==0.1' --candidate 'torch==2 peft==0.2'",
        ),
        ({"versions": {"peft": None}}, {"versions": {"peft": "0.2"}}, ""),
    ],
)
def test_the_command_that_would_confirm(before, after, words):
    """The command compares versions if they differ, else commits; there is none if a side cannot be reconstructed."""
    moment = Moment(
        run="r", folder="r", created_unix_s=0.0, value=1.0, low=None, high=None, replicates=1, commit=None,
        dirty=False, versions={}, why_not=None,
    )  # fmt: skip
    row = {"study": "mine", "variant": "plain"}
    sides = (MeasuredRun(msgspec.structs.replace(moment, **one), row, {}) for one in (before, after))
    command = confirm_command(*sides)
    assert command == (f"lorameter ab mine.toml {words} --variant plain" if words else "")


def said(history, width=200, **options):
    return render_text(describe_history(history, **options), width=width, coloured=False)
