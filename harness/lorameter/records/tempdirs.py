"""Manages temporary folders of this program, and removes those of its killed processes.

A folder contains a file that its process keeps locked until it ends in any way: a process that makes a folder first
removes those of dead processes. A folder without that file belongs to another program, or is being made, and is not
removed.
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
"""The locked file, which gets this name after it has been locked."""
_DRAFT = f"{OWNER}.new"


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a temporary folder, which is removed at the end; yields its resolved path.

    Raises:
        InvalidRunError: there is no writable folder for temporary files.
        OSError: writing to it failed.
    """
    remove_abandoned()
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
    except FileNotFoundError as error:  # tempfile's message, with all folders that it has tried
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
    """Whether this is a temporary folder of this program, in use or abandoned."""
    return folder.name.startswith(PREFIX) and any((folder / name).is_file() for name in (OWNER, _DRAFT))


def is_abandoned(folder: Path) -> bool:
    """Whether the process that made this temporary folder has died without removing it."""
    try:
        with (folder / OWNER).open("r+") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # its process is alive, or it is not ours
        return False
    return True


def remove_abandoned() -> None:
    """Remove the folders that dead processes of this user have left in the current temporary directory."""
    with contextlib.suppress(OSError):
        for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError):  # another process may be removing it
                made = folder.lstat()
                if made.st_uid == os.getuid() and folder.is_dir() and not folder.is_symlink() and is_abandoned(folder):
                    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def remove_on_failure(folder: Path, *, unless: str) -> Iterator[None]:
    """Remove a folder after a stop or an error, unless the file `unless` shows that the work in it has begun. After an
    error, a folder with logs stays, because they contain the reason."""
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt) or not (folder / "logs").exists()
        if stopped and not (folder / unless).is_file():
            shutil.rmtree(folder, ignore_errors=True)
        raise
