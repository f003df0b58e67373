"""Temporary folders of this program, and what its killed processes have left of theirs.

A folder holds a file that its process keeps locked as long as it lives, however it ends: a process that makes a folder
first removes those of dead ones. One without that file is not ours, or is being made, and is left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lorameter.errors import InvalidRunError

PREFIX = "lorameter-"
OWNER = ".owner"
"""The file that is locked. It gets this name when it is."""
_DRAFT = f"{OWNER}.new"


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new temporary folder, removed at the end, by its resolved path.

    Raises:
        InvalidRunError: no folder for temporary files can be written.
        OSError: the one that is there refuses.
    """
    remove_abandoned()
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
    except FileNotFoundError as error:  # the words of tempfile, with all folders that it has tried
        raise InvalidRunError(f"{error.strerror}. Free space in one of them, or name another with TMPDIR.") from None
    try:
        draft = folder / _DRAFT
        with draft.open("w") as owner:
            with contextlib.suppress(OSError):  # a disk without locks: the folder stays if its process dies
                fcntl.flock(owner, fcntl.LOCK_EX)
                draft.rename(folder / OWNER)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_scratch(folder: Path) -> bool:
    """Whether this is a temporary folder of ours, in use or abandoned."""
    return folder.name.startswith(PREFIX) and any((folder / name).is_file() for name in (OWNER, _DRAFT))


def is_abandoned(folder: Path) -> bool:
    """Whether the process that made this temporary folder of ours has died without removing it."""
    try:
        with (folder / OWNER).open("r+") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # its process lives, or it is not ours
        return False
    return True


def remove_abandoned() -> None:
    """Remove what dead processes of this user have left where temporary folders are made now."""
    with contextlib.suppress(OSError):
        for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError):  # another process removes it at the same time
                made = folder.lstat()
                if made.st_uid == os.getuid() and folder.is_dir() and not folder.is_symlink() and is_abandoned(folder):
                    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def leaving_nothing(folder: Path, *, unless: str) -> Iterator[None]:
    """Remove a folder in which nothing has begun, after a stop or an error; `unless` is the file that says that it has.
    After an error a folder with logs stays, because they say why."""
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt) or not (folder / "logs").exists()
        if stopped and not (folder / unless).is_file():
            shutil.rmtree(folder, ignore_errors=True)
        raise
