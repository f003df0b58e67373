"""Tests of journals, which only grow: reading of their lines, and the refusal of other files."""

from __future__ import annotations

import json
import shutil

import pytest

from lorameter.cli import main
from lorameter.errors import UsageError
from lorameter.records import fileio, store
from tests.constructed import RUNS


@pytest.fixture
def runs(tmp_path):
    """A folder with one run."""
    shutil.copytree(RUNS / "sound", tmp_path / "it")
    return tmp_path


def test_a_journal_that_is_no_plain_file_is_refused_by_its_name(runs, capsys):
    """Commands that read the run refuse it; a list shows it as damaged and still has the other runs."""
    (runs / "it" / store.TRIALS).unlink()
    (runs / "it" / store.TRIALS).symlink_to("/dev/zero")
    with pytest.raises(UsageError, match=r"trials\.jsonl: cannot be read: .*Restore it, or remove it"):
        store.read_run("it", runs)
    assert main(["list", "runs", "--json", "--runs-dir", str(runs)]) == 0
    (row,) = json.loads(capsys.readouterr().out)["runs"]
    assert row["status"] == "damaged"
    assert "trials.jsonl: cannot be read" in row["title"]


def test_lines_are_read_as_they_were_appended(tmp_path):
    """Lines keep their line ends, blank lines are skipped, and bytes that are not UTF-8 are escaped."""
    fileio.append(tmp_path / "x", "one\n")
    fileio.append(tmp_path / "x", "two")
    with (tmp_path / "x").open("ab") as file:
        file.write(b"\n\n \r\nthr\xffee\n")
    assert list(fileio.journal_lines(tmp_path / "x")) == ["one\n", "two\n", "thr\\xffee\n"]
    assert list(fileio.journal_lines(tmp_path / "none")) == []
    assert list(fileio.journal_lines(tmp_path / ("x" * 300))) == []
