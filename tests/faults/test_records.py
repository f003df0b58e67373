"""Tests of records that were corrupted after writing: the report fails and gives their number, other records count, and
`--resume` measures only the trials of the damaged ones again."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lorameter.records.store import TRIALS

STUDY_TRIALS = 9
"""Three trials of each of the two variants and the control."""


@pytest.fixture
def whole(command, only_run):
    """A complete run and its lines."""
    done = subprocess.run(command(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = only_run()
    return run, (run.path / TRIALS).read_bytes().splitlines(keepends=True)


@pytest.fixture
def reported(runs):
    """A function that prints the report of a run as text."""

    def report(name):
        words = [sys.executable, "-m", "lorameter.cli", "report", name, "--runs-dir", str(runs)]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    return report


def flipped(line):
    """Flip one bit of the last byte before the line end, which corrupts the closing brace."""
    return line[:-2] + bytes([line[-2] ^ 1]) + b"\n"


def swallowed(line):
    """Remove the second half and the line end, so that the next record is on the same line."""
    return line[: len(line) // 2]


@pytest.mark.parametrize("spoil", [flipped, swallowed])
def test_records_that_are_corrupt_are_measured_again(spoil, whole, reported, only_run, resumed):
    """With a corrupt line in the middle the report exits with 4, neighbouring records are unchanged, and its trial is
    measured again with its whole group."""
    run, lines = whole
    assert len(lines) > STUDY_TRIALS
    place = next(i for i, line in enumerate(lines) if b'"r1-b"' in line and b'"status":"ok"' in line.replace(b" ", b""))
    (run.path / TRIALS).write_bytes(b"".join((*lines[:place], spoil(lines[place]), *lines[place + 1 :])))
    done = reported(run.manifest.run)
    assert (done.returncode, "Traceback" in done.stderr) == (4, False), done.stdout + done.stderr
    assert "damaged" in done.stdout
    found = only_run()
    assert found.damaged_lines == 1
    before = {record.trial: record for record in run.records}
    assert all(before[record.trial] == record for record in found.records)
    mended = resumed()
    assert (mended.state, mended.damaged_lines, len(mended.records)) == ("complete", 0, len(run.records))
    again = {record.trial for record in mended.records if record != before[record.trial]}
    assert again
    assert {trial.partition("-")[0] for trial in again} == {"r1"}
    assert reported(run.manifest.run).returncode == 0
