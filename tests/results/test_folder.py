"""Every run of a folder is read, and one that cannot be read hides no other."""

import shutil

from lorameter.results.folder import read_each, summary_of
from lorameter.results.pack import pack
from tests.constructed import DAMAGED, RUNS


def found_in(runs):
    return {one.path.name: one for one in read_each(runs, summary_of)}


def test_every_constructed_run_is_summarised():
    """Verdicts are those of the reports."""
    found = {one.content.run: one.content for one in read_each(RUNS, summary_of)}
    names = ("sound", "failed", "control-failed", "ab", "ab-improved")
    verdicts = ["valid", "invalid", "invalid", "regressed", "improved"]
    assert [found[name].verdict for name in names] == verdicts
    assert found["killed"].state == "killed"


def test_damaged_runs_are_named_and_hide_no_other(tmp_path):
    """Each has its reason."""
    shutil.copytree(DAMAGED, tmp_path / "runs")
    shutil.copytree(RUNS / "sound", tmp_path / "runs" / "sound")
    found = found_in(tmp_path / "runs")
    assert found["sound"].error is None
    assert "schema 99" in found["newer-schema"].error
    assert found["cut-manifest"].content is None
    assert "cannot be read" in found["cut-manifest"].error


def test_a_packed_run_in_the_folder_is_one_of_them(sound):
    """It is named by its file."""
    pack("sound", sound.parent, sound.parent / "sent.lorameter.zip")
    assert set(found_in(sound.parent)) == {"sound", "sent.lorameter.zip"}
    shutil.rmtree(sound)
    found = found_in(sound.parent)
    assert set(found) == {"sent.lorameter.zip"}
    assert found["sent.lorameter.zip"].content.verdict == "valid"
