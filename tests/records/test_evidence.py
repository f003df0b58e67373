"""Tests that evidence is stored once, before the record that refers to it, and that no record is read without its
checks."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from lorameter.records import store
from lorameter.records.record import TrialRecord
from lorameter.records.store import TRIALS, Manifest, Resumption, RunWriter
from lorameter.records.trials import CHECKS

BITS = {"path": "base.bits", "required": 4, "observed": 4, "status": "active", "reason": "60 of 60 layers: 4 – all"}
MASK = {"path": "attention.mask", "required": None, "observed": "explicit", "status": "active", "reason": "seen"}
SHARE = {"path": "padding.share", "required": None, "observed": 0.25, "status": "active", "reason": "a quarter"}


def manifest(**changes):
    fields = {
        "run": "run", "study": {}, "phases": ("train",), "interleaving": "replicates", "order": ("t0", "t1", "t2"),
        "seed": 0, "created_unix_s": 1.0, "provenance": {}, "fingerprint": "f",
    }  # fmt: skip
    return Manifest(**(fields | changes))


def record(number, *checks, **changes):
    fields = {
        "trial": f"t{number}", "status": "ok", "name": "a", "variant": "i", "role": "variant", "replicate": number,
        "position": number, "interleaving": "replicates", "seed": 0, "started_unix_s": 0.0, "wall_time_s": 1.0,
        "checks": checks,
    }  # fmt: skip
    return TrialRecord(**(fields | changes))


RECORDS = (record(0, BITS, MASK), record(1, BITS, MASK), record(2, SHARE, BITS))


@pytest.fixture
def written(tmp_path):
    """A run of three records whose checks are nearly the same."""
    writer = RunWriter(tmp_path, manifest())
    for one in RECORDS:
        writer.append(one)
    writer.finish("complete")
    return writer.path


def read(path):
    return store.read_run(str(path), path.parent)


def test_evidence_is_stored_once_and_records_refer_to_it(written):
    """Three stored checks serve six references; a reader gets the full checks."""
    evidence = [json.loads(line) for line in (written / CHECKS).read_text().splitlines()]
    assert [line["check"] for line in evidence] == [BITS, MASK, SHARE]
    first, second, third = (line["hash"] for line in evidence)
    named = [json.loads(line)["checks"] for line in (written / TRIALS).read_text().splitlines()]
    assert named == [[first, second], [first, second], [third, first]]
    assert read(written).records == RECORDS


def test_a_crash_at_any_byte_leaves_records_with_their_checks(written, tmp_path, monkeypatch):
    """For any written prefix, a record is complete or missing."""
    evidence = (written / CHECKS).read_bytes().splitlines(keepends=True)
    records = (written / TRIALS).read_bytes().splitlines(keepends=True)
    steps = [(CHECKS, evidence[0] + evidence[1]), (TRIALS, records[0]), (TRIALS, records[1])]
    steps += [(CHECKS, evidence[2]), (TRIALS, records[2])]
    monkeypatch.setattr(os, "fsync", lambda number: None)  # the crash is simulated, and a disk is slow
    for whole, (name, text) in enumerate(steps):
        for cut in range(0, len(text), 19):
            path = tmp_path / f"cut-{whole}-{cut}"
            path.mkdir()
            shutil.copy(written / "manifest.json", path)
            for file, part in [*steps[:whole], (name, text[:cut])]:
                with (path / file).open("ab") as target:
                    target.write(part)
            found = read(path)
            done = sum(file == TRIALS for file, _ in steps[:whole])
            assert found.records == RECORDS[:done]
            assert (found.damaged_lines, found.without_evidence) == (name == TRIALS and cut > 0, 0)
            writer = RunWriter(tmp_path, manifest(run=path.name, resumed=(Resumption(
                unix_s=2.0, harness=None, commit=None),)))  # fmt: skip
            for one in RECORDS[done:]:
                writer.append(one)
            assert read(path).records == RECORDS
            assert read(path).damaged_lines == 0


def test_a_record_whose_evidence_is_lost_is_a_damaged_line(written):
    """It is counted and left out; the other records are read."""
    lines = (written / CHECKS).read_text().splitlines(keepends=True)
    (written / CHECKS).write_text(lines[0] + lines[1])
    run = read(written)
    assert run.records == RECORDS[:2]
    assert (run.damaged_lines, run.without_evidence) == (1, 1)
    (written / CHECKS).unlink()
    assert (read(written).records, read(written).without_evidence) == ((), 3)


def test_a_credential_in_a_reason_is_not_written(tmp_path):
    """A reason may quote the error of a library."""
    reason = "OSError: 401 for https://me:hunter2@host/x, password=hunter2"
    writer = RunWriter(tmp_path, manifest())
    for number in range(2):
        writer.append(record(number, BITS | {"reason": reason}))
    assert "hunter2" not in "".join(path.read_text() for path in writer.path.glob("*.json*"))
    assert len((writer.path / CHECKS).read_text().splitlines()) == 1
    (found, _) = read(writer.path).records
    assert found.checks[0]["reason"] == "OSError: 401 for https://***@host/x, password=***"
