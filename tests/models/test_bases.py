"""Tests of prepared bases on disk: complete or absent, and removed when unused."""

import errno
import os
import time

import pytest

from lorameter.models import bases
from lorameter.models.bases import BaseDescription


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The folder of prepared bases."""
    monkeypatch.setenv(bases.ENV_BASES, str(tmp_path / "bases"))
    return tmp_path / "bases"


def keep(name, content=b"weights", *, used_days_ago=0.0):
    """Write a base that was last used the given number of days ago and return its folder."""
    folder = bases.bases_dir() / name
    with bases.draft_of(folder) as draft:
        (draft / bases.TENSORS).write_bytes(content)
        bases.write_description(draft, BaseDescription(digest="0", bytes=len(content), name_or_path="m"))
    used = time.time() - used_days_ago * 24 * 3600
    os.utime(folder / bases.DESCRIPTION, (used, used))
    return folder


def test_an_incomplete_base_does_not_count():
    """A base with an unreadable description does not count either."""
    folder = keep("one")
    assert bases.read_description(folder).bytes == 7
    (folder / bases.TENSORS).write_bytes(b"weight")
    assert bases.read_description(folder) is None
    (folder / bases.DESCRIPTION).write_text("{")
    assert bases.read_description(folder) is None


def test_a_write_that_fails_leaves_nothing(home):
    """The earlier base stays until the new one is complete."""
    folder = keep("one")

    def break_off():
        with bases.draft_of(folder) as draft:
            (draft / bases.TENSORS).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        break_off()
    assert bases.read_description(folder) is not None
    assert [path.name for path in home.iterdir()] == ["one"]


def test_unused_bases_are_removed(home):
    """Bases are removed after a month, then the least recently used until the rest is small enough, but none that was
    used within a day."""
    for name, days in (("old", 40), ("older", 3), ("newer", 2), ("newest", 0.5)):
        keep(name, b"w" * 10_000, used_days_ago=days)
    bases.prune()
    assert {path.name for path in home.iterdir()} == {"older", "newer", "newest"}
    bases.prune(most_bytes=25_000)
    assert {path.name for path in home.iterdir()} == {"newer", "newest"}
    bases.prune(most_bytes=0)
    assert {path.name for path in home.iterdir()} == {"newest"}
