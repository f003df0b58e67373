"""Tests of write errors for files that a user names: the previous file stays, no partial file is left, and the exit
code is 4."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat

import pytest

from lorameter.errors import InvalidRunError, UsageError
from lorameter.records import store
from lorameter.report.html.page import save_html
from lorameter.results.files import write_tables, write_text
from lorameter.results.pack import pack
from tests.constructed import RUNS

TOO_LARGE = r"File too large\. Raise the limit of file sizes \(ulimit -f\), or "
KIB = 1024


@contextlib.contextmanager
def limited(most=KIB):
    """Limit the file size of this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def run():
    """A run of a few kilobytes."""
    return store.read_run("sound", RUNS)


WRITERS = {
    "csv": lambda run, path: write_tables(run, "csv", path, "samples"),
    "parquet": lambda run, path: write_tables(run, "parquet", path, "trials"),
    "text": lambda run, path: write_text(["x" * 8 * KIB], path),
    "page": lambda run, path: save_html("x" * 8 * KIB, path),
}


@pytest.mark.parametrize("writer", ["csv", pytest.param("parquet", marks=pytest.mark.faults), "text", "page"])
def test_a_file_that_does_not_fit_keeps_the_previous_one(writer, run, tmp_path):
    """The previous file is complete, keeps its permissions and is the only file; with free space it is replaced."""
    path = tmp_path / "named"
    path.write_text("before")
    path.chmod(0o640)
    with limited(), pytest.raises(InvalidRunError, match=rf"named: {TOO_LARGE}"):
        WRITERS[writer](run, path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    WRITERS[writer](run, path)
    assert path.stat().st_size > KIB
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_several_files_are_replaced_all_or_none(run, tmp_path):
    """The first tables fit and another does not."""
    for name in write_tables(run, "csv", tmp_path / "out"):
        name.write_text("before")
    sizes = {path.name: path.stat().st_size for path in write_tables(run, "csv", tmp_path / "other")}
    most = sorted(sizes.values())[-1] - 1
    with limited(most), pytest.raises(InvalidRunError, match=TOO_LARGE):
        write_tables(run, "csv", tmp_path / "out")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == dict.fromkeys(sizes, "before")


def test_a_pack_that_does_not_fit_leaves_no_partial_file(tmp_path, monkeypatch):
    """No partial file is left, an existing file stays, and a missing folder is an error of the user."""

    def write_half(target, folder):
        target.write_text(folder.name)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UsageError, match=r"no/x\.zip: cannot be written: No such file or directory\. Give another"):
        pack("sound", RUNS, tmp_path / "no" / "x.zip")
    monkeypatch.setattr("lorameter.results.pack.write_packed", write_half)
    with pytest.raises(InvalidRunError, match=r"x\.zip: No space left on device\. Free space there, or give another"):
        pack("sound", RUNS, tmp_path / "x.zip")
    assert not list(tmp_path.iterdir())
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UsageError, match="there is a file of that name"):
        pack("sound", RUNS, tmp_path / "link")


def test_no_room_to_unpack_is_no_fault_of_the_file(tmp_path):
    """The error blames the disk and not the valid packed run."""
    path = pack("sound", RUNS, tmp_path / "x.zip")
    with limited(), pytest.raises(InvalidRunError, match=rf"x\.zip, unpacked into .*: {TOO_LARGE}name another folder"):
        store.read_run(str(path), tmp_path)


def test_a_file_that_may_not_be_written_is_not_replaced(tmp_path, monkeypatch):
    """A replacement would only need the right to write to its folder."""
    (tmp_path / "named").write_text("before")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UsageError, match="named: cannot be written: Permission denied"):
        write_text("after", tmp_path / "named")
    assert (tmp_path / "named").read_text() == "before"
