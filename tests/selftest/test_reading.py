"""The program that reads large runs, in small."""

from harness.records import store
from harness.records.record import SCHEMA


def test_both_forms_of_a_run_hold_the_same(program, tmp_path):
    """What is read is no emptier than what was measured: every sample, and all evidence, whichever schema wrote it."""
    reading = program("reading")
    full, once = (
        store.read_run(str(reading.write_run(tmp_path, 3, 2, 20, schema=schema)), tmp_path)
        for schema in (reading.FULL_SCHEMA, SCHEMA)
    )
    assert len(full.records) == 8
    assert [record.replaced(schema=SCHEMA) for record in full.records] == list(once.records)
    assert all(len(record.samples["step_time_s"]) == 20 and len(record.checks) > 9 for record in full.records)
    samples = [time for record in full.records for time in record.samples["step_time_s"]]
    assert len(set(samples)) == 8 * 20


def test_a_bound_that_is_broken_is_said(program, tmp_path, monkeypatch):
    """With what was taken and what was allowed; a run that holds all bounds says nothing."""
    reading = program("reading")
    path = reading.write_run(tmp_path, 2, 2, 20, schema=SCHEMA)
    monkeypatch.setattr(reading, "read_apart", lambda path: reading.Cost(11.0, 12.0, 10**9))
    taken = {"report": 2.0, "compare": 4.0}
    monkeypatch.setattr(reading, "command_apart", lambda path, command, *_: reading.Cost(taken[command], 5.0))
    said = []
    broken = list(reading.judge(path, "small", 3.0, said.append))
    assert broken[0] == "small: 11.00 seconds to read, at most 10 allowed"
    assert "times its size in memory" in broken[1]
    assert broken[2] == "small: 4.00 seconds to compare, at most 3 allowed"
    assert len(broken) == 3
    assert "6 trials" in said[0]
    taken["compare"] = 2.0
    monkeypatch.setattr(reading, "copy_run", lambda path: path)
    monkeypatch.setattr(reading, "read_apart", lambda path: reading.Cost(1.0, 1.0, 1))
    assert not list(reading.judge(path, "small", 3.0, said.append))
