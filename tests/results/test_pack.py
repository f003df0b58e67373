"""Tests of packed runs: the file reads as the run does and holds no credentials."""

import zipfile

import pytest

from lorameter import cli
from lorameter.errors import UsageError
from lorameter.records import packed, store
from lorameter.records.fileio import write_document
from lorameter.records.locks import alone
from lorameter.records.record import Notice
from lorameter.results import pack as packing
from lorameter.results.columns import TABLES
from lorameter.results.pack import pack
from lorameter.results.rows import table_of
from tests.constructed import RUNS


def content(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


@pytest.mark.parametrize("name", ["sound", "ab", "failed", "killed"])
def test_a_packed_run_equals_its_run(name, tmp_path):
    """All rows of all tables, the state of the run and the number of damaged lines are equal."""
    there, here = store.read_run(name, RUNS), store.read_run(str(pack(name, RUNS, tmp_path / "x.zip")), RUNS)
    before, after = ({name: list(table_of(run, name)) for name in TABLES} for run in (there, here))
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


def test_a_run_under_way_and_a_place_that_is_taken_are_refused(mine, tmp_path):
    """The errors say what to do."""
    pack("mine", mine.parent)
    with pytest.raises(UsageError, match="another --output"):
        pack("mine", mine.parent)
    with pytest.raises(UsageError, match="packed already"):
        pack("mine.lorameter.zip", mine.parent)
    with pytest.raises(UsageError, match="cannot be written"):
        pack("mine", mine.parent, tmp_path / "no" / "such" / "x.zip")
    with pytest.raises(UsageError, match="not found"):
        pack("nothing", mine.parent)
    manifest = store.read_manifest(mine)
    write_document(mine / "manifest.json", packing.codec.to_json(manifest) | {"status": "running"})
    with alone(mine / store.TRIALS, ""), pytest.raises(UsageError, match="being measured"):
        pack("mine", mine.parent, tmp_path / "y.zip")


@pytest.mark.parametrize("change", ["cut", "empty", "no manifest", "too large", "another file"])
def test_a_bad_packed_file_is_refused_and_nothing_is_written(change, tmp_path, monkeypatch):
    """A bad file is refused by name, and nothing is written outside the program's own folder."""
    path = pack("sound", RUNS, tmp_path / "x.zip")
    if change == "cut":
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 3] + data[-400:])
    elif change == "too large":
        monkeypatch.setattr(packed, "MOST_BYTES", 1000)
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
