"""What a history takes of each run."""

import json
import shutil

import pytest

from lorameter.records import store
from lorameter.results.pack import pack
from lorameter.results.points import read_nights
from lorameter.results.rows import estimate_rows
from lorameter.studies.from_run import read_study
from tests.constructed import RUNS


def test_a_point_is_the_estimate_of_the_run(sound):
    """It has the same number with the same interval, and no other metric is estimated."""
    run = store.read_run("sound", sound.parent)
    for metric, place in (("step_time_s", 8), ("host_peak_train_bytes", 8)):
        rows = [row for row in estimate_rows(run, read_study(run)) if row[place] == metric and row[5] == "variant"]
        ((night,), _) = read_nights(sound.parent, metric)
        assert {point.variant: (point.value, point.low, point.high) for point in night.points} == {
            row[3]: row[11:14] for row in rows
        }
        assert {point.metric for point in night.points} == {metric}


def test_of_every_constructed_run_what_does_not_count_says_why():
    """An A/B has two sides and no point."""
    nights = {night.folder: night for night in read_nights(RUNS, "step_time_s")[0]}
    points = {(folder, point.variant): point for folder, night in nights.items() for point in night.points}
    assert not nights["ab"].points
    assert points["sound", "lora-r16"].broken is None
    assert "control" in points["control-failed", "lora-r16"].broken


def test_a_packed_run_has_its_points(sound):
    """They are those of its folder."""
    ((before,), _) = read_nights(sound.parent, "step_time_s")
    pack("sound", sound.parent, sound.parent / "sent.lorameter.zip")
    shutil.rmtree(sound)
    ((after,), _) = read_nights(sound.parent, "step_time_s")
    assert after.folder == "sent.lorameter.zip"
    assert after.points == before.points


def test_facts_tell_what_changed(sound):
    """They hold libraries, commit and machine."""
    ((night,), _) = read_nights(sound.parent, "step_time_s")
    assert night.facts["libraries"]["torch"] == "1.0"
    assert night.facts["git"] == {"commit": None, "dirty": None}
    assert json.dumps(night.facts)


def test_facts_of_scripts_are_those_that_their_processes_tell(write_run):
    """They are of what trained, and not of the interpreter that was found before."""
    path = write_run(
        "one",
        {"plain": [1.0, 1.1]},
        change=lambda record: record.replaced(software={"torch": "3.0", "python": "3.12.1"}),
    )
    ((night,), _) = read_nights(path.parent, "step_time_s")
    assert (night.facts["libraries"]["torch"], night.facts["python"]) == ("3.0", "3.12.1")


@pytest.mark.parametrize("study", [{"name": 1}, {}])
def test_a_run_whose_study_cannot_be_read_is_named(sound, study):
    """The others are read all the same."""
    from lorameter.records import codec
    from lorameter.records.fileio import write_document

    shutil.copytree(sound, sound.with_name("torn"))
    changed = codec.to_json(store.read_manifest(sound.with_name("torn"))) | {"study": study}
    write_document(sound.with_name("torn") / "manifest.json", changed)
    nights, unreadable = read_nights(sound.parent, "step_time_s")
    assert [night.folder for night in nights] == ["sound"]
    assert set(unreadable) == {"torn"}
