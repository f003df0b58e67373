"""Tests of how the data of a workload is resolved from its name and the existing files, without opening them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorameter.errors import UsageError
from lorameter.studies.data_source import make_absolute, resolve


@pytest.mark.parametrize(
    ("data", "name", "config", "split"),
    [
        ("databricks/databricks-dolly-15k", "databricks/databricks-dolly-15k", "", "train"),
        ("openai/gsm8k:main", "openai/gsm8k", "main", "train"),
        ("openai/gsm8k:main[test]", "openai/gsm8k", "main", "test"),
        ("owner/name[dev]", "owner/name", "", "dev"),
    ],
)
def test_a_hub_id_may_have_a_configuration_and_a_split(data, name, config, split):
    """Each id has one spelling, which is also its label."""
    source = resolve(data)
    assert (source.kind, source.name, source.config, source.split) == ("hub", name, config, split)
    assert source.label == f"{data}{'' if '[' in data else '[train]'}"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("./nothing.jsonl", "no such file or folder"),
        ("nothing.csv.gz", "no such file or folder"),
        ("/nowhere/at/all", "no such file or folder"),
        ("~", "no such file or folder"),
        ("nothing", "no such file or folder, and no id of the hub"),
        ("a/b/c", "no id of the hub"),
        ("owner/name[train:100]", "no id of the hub"),
        ("owner/name:", "no id of the hub"),
        ("", "no id of the hub"),
    ],
)
def test_a_data_source_that_does_not_exist_is_refused(data, words, tmp_path, monkeypatch):
    """The error lists the accepted forms."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words) as caught:
        resolve(data)
    assert "owner/name:config[split]" in str(caught.value)


def test_existing_files_take_precedence_over_the_hub(tmp_path, monkeypatch):
    """Existing files precede the hub, also a file whose name ends in brackets; a pipe is not a file, and a file has no
    splits."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    Path("owner/name/a.jsonl").touch()
    Path("b.txt").touch()
    Path("notes.md").touch()
    os.mkfifo("pipe.jsonl")
    assert resolve("owner/name").kind == "folder"
    assert resolve("owner/name/a.jsonl").files == (Path("owner/name/a.jsonl"),)
    (tmp_path / "x[train]").mkdir()
    Path("x[train]/c.csv").touch()
    assert (resolve("x[train]").name, resolve("x[train]").split) == ("x[train]", "")
    for data, words in (
        ("b.txt[train]", "a file has no splits"),
        ("notes.md", "a file of no known kind"),
        ("pipe.jsonl", "no plain file"),
        ("owner", "no file in it is of a known kind"),
    ):
        with pytest.raises(UsageError, match=words):
            resolve(data)


@pytest.mark.parametrize(
    ("names", "split", "taken"),
    [
        ("a.jsonl b.jsonl", "", "a.jsonl b.jsonl"),
        ("train.jsonl test.jsonl extra.jsonl", "", "train.jsonl"),
        ("my.train.jsonl.gz my.test.jsonl.gz", "", "my.train.jsonl.gz"),
        ("train-00000-of-00002.parquet train-00001-of-00002.parquet validation-00000-of-00001.parquet", "validation",
         "validation-00000-of-00001.parquet"),
        ("test.csv", "", "test.csv"),
        ("contest.csv trains.csv", "", "contest.csv trains.csv"),
        ("train.jsonl test.csv", "", "train.jsonl"),
    ],
)  # fmt: skip
def test_the_split_is_a_word_of_the_file_name(names, split, taken, tmp_path):
    """The split is a word of the file name; "train" is the default where it exists."""
    for name in names.split():
        (tmp_path / name).touch()
    source = resolve(f"{tmp_path}[{split}]" if split else str(tmp_path))
    assert [path.name for path in source.files] == taken.split()


@pytest.mark.parametrize(
    ("names", "split", "words"),
    [
        ("test.jsonl dev.jsonl", "", "the splits dev, test. Name one"),
        ("test.jsonl other.jsonl", "", "files of test and others are in it"),
        ("train.jsonl", "test", "no split 'test'. There are train"),
        ("a.jsonl", "test", "no split 'test'. There is none"),
        ("a.jsonl b.csv", "", r"different kinds are in it: \.csv, \.jsonl"),
        ("notes.md", "", "no file in it is of a known kind"),
    ],
)
def test_a_folder_that_could_be_read_in_two_ways_is_refused(names, split, words, tmp_path):
    """An ambiguous folder needs a split."""
    for name in names.split():
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=words):
        resolve(f"{tmp_path}[{split}]" if split else str(tmp_path))


def test_a_name_is_made_absolute_with_its_split(tmp_path, monkeypatch):
    """A name without an existing file is unchanged."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert make_absolute("folder") == str(tmp_path / "folder")
    assert make_absolute("folder[test]") == f"{tmp_path / 'folder'}[test]"
    for data in ("synthetic", "owner/name:config[test]", "./nothing.jsonl"):
        assert make_absolute(data) == data
