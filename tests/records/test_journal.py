"""Files that only grow, read when something else lies in their place: refused at once, and nothing else is stopped."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from lorameter.cli import main
from lorameter.errors import UsageError
from lorameter.records import fileio, store
from tests.constructed import RUNS


def make_pipe(path):
    """A pipe that nobody writes into."""
    os.mkfifo(path)


def make_link(path):
    """A link to what has no end."""
    path.symlink_to("/dev/zero")


def make_sparse(path):
    """A file of 256 GiB, of which nothing was ever written."""
    with path.open("wb") as file:
        file.truncate(256 << 30)


def make_line(path):
    """A line that is longer than a line may be."""
    path.write_bytes(b"x" * 2048)


@pytest.fixture(params=[make_pipe, make_link, make_sparse, make_line])
def no_journal(request, monkeypatch):
    """A function that puts what is no journal in the place of a file."""
    monkeypatch.setattr(fileio, "LINE_BYTES", 1024)

    def make(path):
        path.unlink(missing_ok=True)
        request.param(path)

    return make


@pytest.fixture
def runs(tmp_path):
    """A folder with a run in it."""
    shutil.copytree(RUNS / "sound", tmp_path / "it")
    return tmp_path


def test_what_is_no_journal_is_refused_by_its_name(runs, no_journal, capsys):
    """By who reads the run; a list of runs says it and goes on."""
    no_journal(runs / "it" / store.TRIALS)
    with pytest.raises(UsageError, match=r"trials\.jsonl: cannot be read: .*Restore it, or remove it"):
        store.read_run("it", runs)
    assert main(["list", "runs", "--json", "--runs-dir", str(runs)]) == 0
    (row,) = json.loads(capsys.readouterr().out)["runs"]
    assert row["status"] == "damaged"
    assert "trials.jsonl: cannot be read" in row["title"]


def test_lines_are_read_as_they_were_appended(tmp_path):
    """With what ends them, blank ones left out; bytes that are no text stand in no JSON."""
    fileio.append(tmp_path / "x", "one\n")
    fileio.append(tmp_path / "x", "two")
    with (tmp_path / "x").open("ab") as file:
        file.write(b"\n\n \r\nthr\xffee\n")
    assert list(fileio.journal_lines(tmp_path / "x")) == ["one\n", "two\n", "thr\\xffee\n"]
    assert list(fileio.journal_lines(tmp_path / "none")) == []
    assert list(fileio.journal_lines(tmp_path / ("x" * 300))) == []
