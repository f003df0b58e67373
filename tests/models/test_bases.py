"""Prepared bases on the disk: whole or absent, never trusted for being there, and gone when the disk is wanted."""

import errno
import os
import time

import pytest

from lorameter.models import bases
from lorameter.models.bases import BaseDescription


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Where bases lie."""
    monkeypatch.setenv(bases.ENV_BASES, str(tmp_path / "bases"))
    return tmp_path / "bases"


def keep(name, content=b"weights", *, used_days_ago=0.0):
    """A base as it is kept; its folder."""
    import hashlib

    folder = bases.bases_dir() / name
    with bases.drafted(folder) as draft:
        (draft / bases.TENSORS).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        bases.write_description(draft, BaseDescription(sha256=digest, bytes=len(content), name_or_path="m"))
    used = time.time() - used_days_ago * 24 * 3600
    os.utime(folder / bases.DESCRIPTION, (used, used))
    return folder


def test_a_base_is_known_by_its_bytes():
    """What is whole is described; a byte that changed, or one that is missing, makes it nobody's."""
    folder = keep("one")
    assert bases.verify(folder).bytes == 7
    (folder / bases.TENSORS).write_bytes(b"wEights")
    assert bases.read_description(folder) is not None  # the size is all that this looks at
    assert bases.verify(folder) is None
    (folder / bases.TENSORS).write_bytes(b"weight")
    assert bases.read_description(folder) is None
    (folder / bases.DESCRIPTION).write_text("{")
    assert bases.read_description(folder) is None
    assert bases.verify(folder.with_name("another")) is None


def test_the_place_follows_from_all_that_the_content_does():
    """Equal for equal facts in any order, and another for any other."""
    one = bases.folder_of({"dtype": "bfloat16", "seed": None})
    assert one == bases.folder_of({"seed": None, "dtype": "bfloat16"})
    assert one != bases.folder_of({"seed": 1, "dtype": "bfloat16"})


def test_half_of_one_is_never_found(home):
    """What breaks off in the middle leaves nothing, and what was there before stays until the new one is whole."""
    folder = keep("one")

    def break_off():
        with bases.drafted(folder) as draft:
            (draft / bases.TENSORS).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        break_off()
    assert bases.verify(folder) is not None
    assert [path.name for path in home.iterdir()] == ["one"]


def test_what_nobody_wants_goes(home):
    """First what was unused for a month, then what was used longest ago, until the rest is small enough."""
    for name, days in (("old", 40), ("older", 3), ("newer", 2), ("newest", 1)):
        keep(name, b"w" * 10_000, used_days_ago=days)
    assert bases.prune() > 10_000
    assert {path.name for path in home.iterdir()} == {"older", "newer", "newest"}
    bases.prune(most_bytes=12_000)
    assert {path.name for path in home.iterdir()} == {"newest"}


def test_what_a_run_holds_stays(home):
    """However old it looks, and however little room there is."""
    folder = keep("held", used_days_ago=400)
    with bases.in_use(folder):
        assert bases.prune(most_bytes=0) == 0
        assert folder.is_dir()
    assert bases.prune(most_bytes=0) > 0
    assert not folder.exists()


def test_what_a_killed_process_has_left_goes(home):
    """A draft that nobody is at; one under way, whose place is locked, stays."""
    from lorameter.records.locks import locked

    for name in ("left", "made"):
        (home / f"{name}.partial").mkdir(parents=True)
    with locked(home / "made", "", print):
        bases.prune()
        assert {path.name for path in home.iterdir() if path.is_dir()} == {"made.partial"}


def test_holding_what_is_not_there_is_no_error():
    """It has been removed meanwhile: its trials then make it themselves."""
    with bases.in_use(bases.bases_dir() / "nowhere"):
        pass
