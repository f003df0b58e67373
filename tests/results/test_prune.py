"""Tests of `lorameter prune`: which runs it removes, and which it always keeps."""

import subprocess
import sys
import time

import pytest

from lorameter import cli
from lorameter.errors import UsageError
from lorameter.records import codec, store
from lorameter.records.fileio import write_document
from lorameter.records.locks import alone
from lorameter.results.prune import prune
from lorameter.verdicts.baselines import accept

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
        with alone(runs / run / store.TRIALS, ""):
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
