"""Tests that every run of a folder is listed, and that an unreadable run hides no other."""

import shutil

from lorameter.results.folder import list_runs
from lorameter.results.pack import pack
from tests.constructed import DAMAGED, RUNS


def rows_of(runs):
    return {row["run"]: row for row in list_runs(runs)}


def test_damaged_runs_are_named_and_hide_no_other(tmp_path):
    """Each damaged run has its reason."""
    shutil.copytree(DAMAGED, tmp_path / "runs")
    shutil.copytree(RUNS / "sound", tmp_path / "runs" / "sound")
    found = rows_of(tmp_path / "runs")
    assert found["sound"]["status"] == "complete"
    assert "schema 99" in found["newer-schema"]["title"]
    assert "cannot be read" in found["cut-manifest"]["title"]


def test_a_packed_run_in_the_folder_is_one_of_them(sound):
    """A packed run is listed with its state and its verdict."""
    pack("sound", sound.parent, sound.parent / "sent.lorameter.zip")
    assert len(list_runs(sound.parent)) == 2
    shutil.rmtree(sound)
    (row,) = list_runs(sound.parent)
    assert (row["run"], row["verdict"]) == ("sound", "valid")
