"""Tests of `lorameter prune`: which runs it removes, and which it always keeps.

Tests of packed runs: the file reads as the run does and holds no credentials.

Tests that every run of a folder is listed, and that an unreadable run hides no other.
"""

import shutil
import subprocess
import sys
import time
import zipfile

import pytest

from lorameter import cli
from lorameter.errors import UsageError
from lorameter.records import codec, store
from lorameter.records.fileio import write_document
from lorameter.records.record import Notice
from lorameter.results import prune as packing
from lorameter.results.history import list_runs
from lorameter.results.prune import pack, prune
from lorameter.results.rows import TABLES, table_rows
from lorameter.verdicts.gate import accept
from tests.constructed import DAMAGED, RUNS

DAY_S = 86400.0


@pytest.fixture
def runs(write_run):
    """Five runs of one study, a day apart with the oldest first, and one run of another study."""
    for day in range(5):
        dated(write_run(f"run{day}", {"plain": [1.0, 1.1, 1.2], "nf4": [1.0, 1.1, 1.2]}), day)
    path = dated(write_run("other", {"plain": [1.0, 1.1], "nf4": [1.0, 1.2]}), 0)
    rewritten(path, study=codec.to_json(store.read_manifest(path).study) | {"name": "other"})
    return path.parent


def dated(path, day):
    return rewritten(path, created_unix_s=time.time() - (9 - day) * DAY_S)


def rewritten(path, **changes):
    write_document(path / "manifest.json", codec.to_json(store.read_manifest(path)) | changes)
    return path


def names(candidates):
    return [one.run for one in candidates]


def test_the_newest_runs_of_each_study_are_kept(runs):
    """Runs are ordered by their start, not by their names; an age limits the removal to older runs."""
    found = prune(runs, keep=2, older_s=6.5 * DAY_S, dry_run=True)
    assert names(found.removed) == ["run0", "run1", "run2"]
    assert found.kept == 3
    assert names(prune(runs, keep=0, older_s=8.5 * DAY_S, dry_run=True).removed) == ["run0", "other"]
    assert names(prune(runs, keep=0, dry_run=True).removed) == ["run0", "other", "run1", "run2", "run3", "run4"]


def test_an_accepted_baseline_is_never_pruned(runs):
    """An accepted baseline is kept, with the reason."""
    accept("run0", runs)
    found = prune(runs, keep=1)
    assert "run0" not in names(found.removed)
    assert [(one.run, one.why) for one in found.staying] == [("run0", "it is an accepted baseline")]
    assert (runs / "run0").is_dir()
    (runs / "baselines.json").write_text("{")
    with pytest.raises(UsageError, match="baselines"):
        prune(runs, keep=1)


def test_a_run_under_way_is_never_pruned(runs):
    """A run that is being measured is kept, whether it began before or after the selection."""
    rewritten(runs / "run0", status="running")
    for run, keep in (("run0", 4), ("run1", 3)):  # the second is being resumed, which its manifest does not record yet
        with store.lock_run(runs / run):
            assert names(prune(runs, keep=keep).staying) == [run]
        assert (runs / run / "manifest.json").is_file()
        (runs / run).rename(runs.parent / run)


def test_an_unreadable_run_is_kept(runs):
    """A run that cannot be read is kept, since its content is unknown."""
    (runs / "run1" / "manifest.json").write_text("{")
    (kept,) = prune(runs, keep=0).staying
    assert kept.run == "run1"
    assert "cannot be read" in kept.why


def test_pruning_removes_only_the_selected_runs(runs):
    """Only the selected runs are removed; the reported size is that of their files."""
    size = sum(file.stat().st_size for file in (runs / "run0").rglob("*") if file.is_file())
    found = prune(runs, keep=3)
    assert (names(found.removed), found.staying) == (["run0", "run1"], [])
    assert found.removed[0].size_bytes == size
    assert sorted(path.name for path in store.list_runs(runs)) == ["other", "run2", "run3", "run4"]
    assert not (runs / "run0").exists()


@pytest.fixture
def called(runs, capsys):
    """A function that calls the command and returns exit code, standard output and standard error."""

    def run(*words):
        code = cli.main(["prune", *words, "--runs-dir", str(runs)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.mark.parametrize("words", [(), ("--keep", "-1"), ("--older", "soon")])
def test_pruning_without_a_selection_is_refused(words, called, runs):
    """A call without a selection exits with 2 and removes nothing."""
    code, out, err = called(*words)
    assert (code, out) == (2, "")
    assert "lorameter:" in err
    assert len(store.list_runs(runs)) == 6


def test_the_next_prune_deletes_leftovers_of_a_killed_one(runs, called):
    """The leftover of a killed removal is not listed by any command, and the next prune deletes it."""
    code = "import os, shutil, sys; from lorameter import cli; shutil.rmtree = lambda *_, **__: os.kill(os.getpid(), 9)"
    command = [sys.executable, "-c", f"{code}; cli.main(sys.argv[1:])", "prune", "--keep", "0", "--runs-dir", str(runs)]
    assert subprocess.run(command, check=False).returncode == -9
    assert len(store.list_runs(runs)) == 5
    assert called("--keep", "5", "--dry-run")[0] == 0
    assert len([path for path in runs.iterdir() if path.is_dir()]) == 6
    assert called("--keep", "5")[0] == 0
    assert sorted(path.name for path in runs.iterdir() if path.is_dir()) == [
        "other",
        *(f"run{day}" for day in range(1, 5)),
    ]


def content(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


@pytest.mark.parametrize("name", ["sound", "ab", "failed", "killed"])
def test_a_packed_run_equals_its_run(name, tmp_path):
    """All rows of all tables, the state of the run and the number of damaged lines are equal."""
    there, here = store.read_run(name, RUNS), store.read_run(str(pack(name, RUNS, tmp_path / "x.zip")), RUNS)
    before, after = ({name: list(table_rows(run, name)) for name in TABLES} for run in (there, here))
    assert {name: len(rows) for name, rows in after.items()} == {name: len(rows) for name, rows in before.items()}
    for name in ("samples", "estimates", "comparisons"):
        assert repr(after[name]) == repr(before[name]), name  # a NaN loss equals nothing
    assert (here.state, here.damaged_lines, len(here.disturbed)) == (
        there.state, there.damaged_lines, len(there.disturbed)
    )  # fmt: skip
    assert [record.checks and [check["status"] for check in record.checks] for record in here.records] == [
        record.checks and [check["status"] for check in record.checks] for record in there.records
    ]


@pytest.fixture
def mine(write_run, monkeypatch, tmp_path):
    """A run with credentials and record texts."""
    secret = "records of https://me:hunter2@host/x and password=hunter2"

    def change(record):
        tokens = {"answer_0": [5, 6, 7], "base_answer_0": [8], "completion": [9, 9], "real_tokens": 64}
        return record.replaced(tokens=tokens, notices=(Notice(code="x", message=secret, remedy=""),))

    path = write_run("mine", {"plain": [1.0, 1.1], "nf4": [1.0, 1.2]}, change=change)
    manifest = store.read_manifest(path)
    manifest.tokens.update(examples=[{"prompt": "Dear diary,", "reference": "I was"}], data=secret)
    write_document(path / "manifest.json", manifest)
    monkeypatch.chdir(tmp_path)
    return path


@pytest.mark.parametrize("texts", [False, True])
def test_a_pack_has_no_credentials_and_texts_only_on_request(mine, texts):
    """Everything else is packed."""
    found = "".join(content(pack("mine", mine.parent, texts=texts)).values())
    assert "hunter2" not in found
    assert "records of https://***@host/x" in found
    assert '"real_tokens":64' in found.replace(" ", "")
    for word in ("Dear diary", "answer_0", "base_answer_0", "completion"):
        assert (word in found) is texts


def test_a_run_under_way_and_an_existing_output_are_refused(mine, tmp_path):
    """The errors say what to do."""
    pack("mine", mine.parent)
    with pytest.raises(UsageError, match="another --output"):
        pack("mine", mine.parent)
    with pytest.raises(UsageError, match="already packed"):
        pack("mine.lorameter.zip", mine.parent)
    with pytest.raises(UsageError, match="cannot be written"):
        pack("mine", mine.parent, tmp_path / "no" / "such" / "x.zip")
    with pytest.raises(UsageError, match="not found"):
        pack("nothing", mine.parent)
    manifest = store.read_manifest(mine)
    write_document(mine / "manifest.json", packing.codec.to_json(manifest) | {"status": "running"})
    with store.lock_run(mine), pytest.raises(UsageError, match="being measured"):
        pack("mine", mine.parent, tmp_path / "y.zip")


@pytest.mark.parametrize("change", ["cut", "empty", "no manifest", "too large", "another file"])
def test_a_bad_packed_file_is_refused_and_nothing_is_written(change, tmp_path, monkeypatch):
    """A bad file is refused by name, and nothing is written outside the program's own folder."""
    path = pack("sound", RUNS, tmp_path / "x.zip")
    if change == "cut":
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 3] + data[-400:])
    elif change == "too large":
        monkeypatch.setattr(store, "MAX_PACKED_BYTES", 1000)
    elif change != "another file":
        with zipfile.ZipFile(path, "w") as archive:
            if change == "no manifest":
                archive.writestr("../manifest.json", "{}")
    else:
        path.write_text("no archive")
    with pytest.raises(UsageError):
        store.read_run(str(path), tmp_path)
    assert not list(tmp_path.parent.glob("manifest.json"))


def test_a_packed_run_cannot_be_resumed(mine, capsys):
    """A packed run cannot be resumed, since it has no folder to write to."""
    pack("mine", mine.parent)
    assert cli.main(["run", "--resume", "mine.lorameter.zip"]) == 2
    assert "packed" in capsys.readouterr().err


def rows_of(runs):
    return {row["run"]: row for row in list_runs(runs)}


def test_damaged_runs_are_listed_with_the_others(tmp_path):
    """Each damaged run has its reason."""
    shutil.copytree(DAMAGED, tmp_path / "runs")
    shutil.copytree(RUNS / "sound", tmp_path / "runs" / "sound")
    found = rows_of(tmp_path / "runs")
    assert found["sound"]["status"] == "complete"
    assert "schema 99" in found["newer-schema"]["title"]
    assert "cannot be read" in found["cut-manifest"]["title"]


def test_a_packed_run_in_the_folder_is_listed(sound):
    """A packed run is listed with its state and its verdict."""
    pack("sound", sound.parent, sound.parent / "sent.lorameter.zip")
    assert len(list_runs(sound.parent)) == 2
    shutil.rmtree(sound)
    (row,) = list_runs(sound.parent)
    assert (row["run"], row["verdict"]) == ("sound", "valid")
