"""The index: made from the runs, as up to date as they are, and never needed."""

import json
import os
import shutil
import sqlite3
import time
from pathlib import Path

import pytest

from harness.records import codec, store
from harness.records.document import write_document
from harness.results import index as indexing
from harness.results.index import index_file, open_index
from harness.results.pack import pack
from harness.results.rows import estimate_rows
from harness.studies.study import Study

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def runs(write_run):
    write_run("one", {"plain": [1.0, 1.1, 1.2], "nf4": [2.0, 2.1, 2.2]})
    return write_run("two", {"plain": [1.0, 1.1, 1.2], "nf4": [2.0, 2.1, 2.2]}).parent


def held(runs, **options):
    with open_index(runs, **options) as index:
        return index.runs(), index.points("step_time_s")


def test_a_point_is_the_estimate_of_the_run(runs):
    """The same number with the same interval."""
    run = store.read_run("one", runs)
    rows = list(estimate_rows(run, codec.from_json(Study, run.manifest.study, "")))
    expected = {row[3]: row[11:14] for row in rows if row[8] == "step_time_s" and row[5] == "variant"}
    with open_index(runs) as index:
        points = index.points("step_time_s", study="small")
        assert {point.variant: (point.value, point.low, point.high) for point in points if point.folder == "one"} == (
            expected
        )
        assert [point.folder for point in index.points("step_time_s", variant="nf4")] == ["one", "two"]
        assert index.points("step_time_s", study="other") == ()
        assert "host_peak_train_bytes" in index.metrics()


def test_every_constructed_run_is_held_with_how_it_stands(tmp_path):
    """Verdicts are those of the reports; what does not count says why."""
    shutil.copytree(GOLDEN / "runs", tmp_path / "runs")
    with open_index(tmp_path / "runs") as index:
        known = {run.run: run for run in index.runs()}
        points = {(point.folder, point.variant): point for point in index.points("step_time_s")}
    names = ("sound", "failed", "control-failed", "ab", "ab-improved")
    verdicts = ["valid", "invalid", "invalid", "regressed", "improved"]
    assert [known[name].verdict for name in names] == verdicts
    assert known["killed"].state == "killed"
    assert known["ab"].sides
    assert not [folder for folder, _ in points if folder == "ab"]
    assert points["sound", "lora-r16"].broken is None
    assert "control" in points["control-failed", "lora-r16"].broken


def test_damaged_runs_are_named_and_hide_no_other(tmp_path):
    """Each with its reason."""
    shutil.copytree(GOLDEN / "damaged", tmp_path / "runs")
    shutil.copytree(GOLDEN / "runs" / "sound", tmp_path / "runs" / "sound")
    known = {run.folder: run for run in held(tmp_path / "runs")[0]}
    assert known["sound"].error is None
    assert (known["newer-schema"].error, known["newer-schema"].newer_schema) == (None, 99)
    assert known["cut-manifest"].state == "damaged"


def test_what_changed_is_read_again_and_what_went_is_taken_out(runs):
    """Nothing else is read: the second time no run is."""
    before = held(runs)
    read = []
    indexing_read = store.read_run

    def watched(name, folder, **options):
        read.append(Path(name).name)
        return indexing_read(name, folder, **options)

    store.read_run = watched
    try:
        assert held(runs) == before
        assert read == []
        write_document(
            runs / "two" / "manifest.json", codec.to_json(store.read_manifest(runs / "two")) | {"status": "failed"}
        )
        assert {run.run: run.state for run in held(runs)[0]} == {"one": "complete", "two": "failed"}
        assert read == ["two"]
        shutil.rmtree(runs / "one")
        assert [run.run for run in held(runs)[0]] == ["two"]
        assert {point.folder for point in held(runs)[1]} == {"two"}
    finally:
        store.read_run = indexing_read


@pytest.mark.parametrize("damage", ["bytes", "empty", "version", "table", "folder", "rebuild"])
def test_the_index_is_never_the_truth(runs, damage):
    """Whatever becomes of its file, the answer is the same."""
    before = held(runs)
    path = index_file(runs)
    if damage == "bytes":
        path.write_bytes(b"no database" * 1000)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "folder":
        path.unlink()
        path.mkdir()
        (path / "x").write_text("")
    else:
        with sqlite3.connect(path) as connection:
            if damage == "version":
                connection.execute("PRAGMA user_version = 99")
            elif damage == "table":
                connection.execute("DROP TABLE points")
            else:
                connection.execute("UPDATE points SET value = 77")
        connection.close()
    assert held(runs, rebuild=damage == "rebuild") == before
    assert held(runs) == before


def test_a_folder_that_may_not_be_written_is_indexed_in_memory(runs, monkeypatch):
    """And one that is not there is empty."""
    real = sqlite3.connect

    def refused(path, **options):
        if path != ":memory:":
            raise sqlite3.OperationalError("unable to open database file")
        return real(path, **options)

    monkeypatch.setattr(indexing.sqlite3, "connect", refused)
    assert len(held(runs)[0]) == 2
    assert not index_file(runs).exists()
    assert held(runs / "none") == ((), ())


def test_a_folder_without_runs_gets_no_index(tmp_path):
    """It may be anybody's; nor is anything written beside runs."""
    (tmp_path / "empty").mkdir()
    assert held(tmp_path / "empty") == ((), ())
    assert not index_file(tmp_path / "empty").exists()


def test_an_index_that_nobody_asks_for_a_month_is_removed_by_the_next(runs):
    """One that is asked stays."""
    held(runs)
    others = [index_file(runs).with_name(f"{name}.sqlite") for name in ("old", "new")]
    for path, days in zip(others, (31, 29), strict=True):
        path.write_bytes(b"")
        os.utime(path, (time.time() - 86400 * days,) * 2)
    held(runs, rebuild=True)
    assert [path.exists() for path in (*others, index_file(runs))] == [False, True, True]


def test_nothing_is_written_beside_the_runs(runs):
    """They may lie in a repository, or on a disk that may only be read."""
    before = sorted(runs.iterdir())
    held(runs)
    assert sorted(runs.iterdir()) == before
    assert index_file(runs).is_file()


def test_a_packed_run_in_the_folder_is_one_of_them(runs):
    """With what it holds."""
    pack("one", runs, runs / "sent.lorameter.zip")
    shutil.rmtree(runs / "one")
    known, points = held(runs)
    assert [run.folder for run in known] == ["sent.lorameter.zip", "two"]
    assert {point.folder for point in points} == {"sent.lorameter.zip", "two"}


def test_facts_tell_what_changed(runs):
    """Libraries, commit and machine, and no path."""
    with open_index(runs) as index:
        facts = index.facts("one")
        assert index.facts("nothing") == {}
    assert facts["libraries"]["torch"] == "1.0"
    assert facts["git"] == {"commit": None, "dirty": None}
    assert json.dumps(facts)


def test_facts_of_scripts_are_those_that_their_processes_tell(write_run):
    """What changed between two runs is what trained, and not the interpreter that was found before."""
    runs = write_run(
        "one",
        {"plain": [1.0, 1.1]},
        change=lambda record: record.replaced(software={"torch": "3.0", "python": "3.12.1"}),
    ).parent
    with open_index(runs) as index:
        facts = index.facts("one")
    assert (facts["libraries"]["torch"], facts["python"]) == ("3.0", "3.12.1")
