"""The folder of a run's jobs holds pickles and commands, so it must be writable by this user alone."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path

from lorameter.errors import UsageError

_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def make_private(folder: Path) -> None:
    """Make a folder for this user alone unless it is there, and check it. Raises `UsageError` as `check_private`."""
    folder.mkdir(mode=stat.S_IRWXU, exist_ok=True)
    check_private(folder)


def check_private(folder: Path) -> None:
    """Check that no other user can write into a folder, or put another one in its place.

    Folders above its parent are not checked.

    Raises:
        UsageError: it is a symbolic link or no folder, belongs to another user, or is writable by its group or others;
            or its parent belongs to another user than root, or is writable by others without the sticky bit.
    """
    own, parent = folder.lstat(), folder.parent.stat()
    if not stat.S_ISDIR(own.st_mode):
        why = "it is no folder, or a symbolic link"
    elif own.st_uid != os.geteuid():
        why = "it belongs to another user"
    elif own.st_mode & _OTHERS:
        why = "other users can write into it"
    else:
        if parent.st_uid not in (0, os.geteuid()):
            why = "it belongs to another user"
        elif _others_can_rename_in(parent):
            why = "other users can rename what is in it"
        else:
            return
        raise UsageError(
            f"folder {folder.parent}: {why}, and jobs run code from {folder.name} in it. Use a --runs-dir of your own, "
            "or one with the sticky bit (chmod +t) that belongs to you or root."
        )
    raise UsageError(f"folder {folder}: {why}, and jobs run code from it. Remove it, or use another --runs-dir.")


def _others_can_rename_in(parent: os.stat_result) -> bool:
    """The group of a user's own name has that user alone in it."""
    others = stat.S_IWOTH if _is_own_group(parent.st_gid) else _OTHERS
    return bool(parent.st_mode & others) and not parent.st_mode & stat.S_ISVTX


def _is_own_group(gid: int) -> bool:
    try:
        return grp.getgrgid(gid).gr_name == pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a number without a name
        return False
