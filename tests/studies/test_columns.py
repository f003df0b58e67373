"""Tests of the workload's column and loss settings, which are shown only where they differ from their defaults."""

from __future__ import annotations

import dataclasses

import pytest

from lorameter.errors import UsageError
from lorameter.machine import provenance
from lorameter.records import codec
from lorameter.studies.study_file import load_study
from lorameter.studies.workload import DataColumns, Workload

STUDY = """
[workload]
loss = "answer"
columns = { instruction = "question", response = "answer" }

[[variant]]
name = "plain"
"""


def test_a_study_names_columns_and_the_loss(tmp_path):
    """The settings are part of the workload, survive JSON and can be hashed."""
    path = tmp_path / "mine.toml"
    path.write_text(STUDY)
    workload = load_study(str(path)).workload
    assert workload.columns.given == {"instruction": "question", "response": "answer"}
    data = codec.to_json(workload)
    assert (data["loss"], data["columns"]["instruction"]) == ("answer", "question")
    assert codec.from_json(Workload, data, "here") == workload
    assert len({workload, codec.from_json(Workload, data, "here"), Workload()}) == 2


def test_labels_are_part_of_the_workload_fingerprint(small_study):
    """Runs with other labels have other workload fingerprints."""

    def fingerprint(**changes):
        study = dataclasses.replace(small_study, workload=dataclasses.replace(small_study.workload, **changes))
        facts = {"workload": provenance._content_of_workloads(study.workload, {})}
        return provenance.fingerprint(facts)

    changed = ({}, {"loss": "answer"}, {"columns": DataColumns(text="body")}, {"columns": DataColumns(text="title")})
    assert len({fingerprint(**changes) for changes in changed}) == 4
    assert fingerprint() == fingerprint(loss="all", columns=DataColumns())


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"instruction": "a", "prompt": "b"}, "instruction = 'a', prompt = 'b': parts of different records"),
        ({"text": "a", "response": "b"}, "parts of different records"),
        ({"question": "a"}, "columns.question = 'a': unknown key"),
        ({"text": 3}, "columns.text = 3: str is expected"),
        ("question", "columns = 'question': a table is expected"),
    ],
)
def test_columns_that_make_no_record_are_refused(columns, words):
    """The error occurs when the study is read."""
    with pytest.raises(UsageError, match=words):
        codec.from_json(Workload, {"columns": columns}, "here")


def test_the_hash_of_a_folder_depends_on_its_contents(tmp_path):
    """The hash of a data folder depends on the split and its bytes, not on the path."""
    contents = {}
    for name, train in (("a", "x"), ("b", "x"), ("c", "y")):
        folder = tmp_path / name / "mine"
        folder.mkdir(parents=True)
        (folder / "train.txt").write_text(train)
        (folder / "test.txt").write_text("z")
        contents[name] = provenance._content_of(str(folder))
        contents[f"{name}[test]"] = provenance._content_of(f"{folder}[test]")
    assert contents["a"] == contents["b"] != contents["c"]
    assert contents["a"].startswith("mine[train] sha256:")
    assert contents["a[test]"] == contents["c[test]"] != contents["a"]
    assert provenance._content_of(str(tmp_path / "a" / "mine" / "test.txt")).startswith("test.txt sha256:")
    assert provenance._content_of("no such thing") == "no such thing"
