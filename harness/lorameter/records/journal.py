"""Files that only grow: what was appended is on the disk before the caller goes on; a crash spoils one line at most."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from lorameter.errors import UsageError
from lorameter.records import bounded_io
from lorameter.records.os_errors import translate_write_errors


def append(path: Path, text: str) -> None:
    """Add whole lines and wait until the disk has them; a line that a crash cut short before them stays one of its own.

    A character that UTF-8 cannot hold (half a surrogate pair, as in the name of a file that is no text) becomes "?".

    Raises:
        OSError: the disk refuses; the file is as it was.
    """
    with path.open("a+b", buffering=0) as file:
        begun = file.seek(0, os.SEEK_END)
        data = text.encode("utf-8", errors="replace")
        if begun:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                data = b"\n" + data
        try:
            while data:  # of what does not fit any more a part may be taken
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                file.truncate(begun)
            error.filename = str(path)
            raise
    if not begun:
        sync_folder(path.parent)


def lines(path: Path) -> Iterator[str]:
    """The lines of a file that are not blank, none where there is no file.

    Bytes that are no text read as "\\xff", which stands in no JSON: nobody wrote them, so the line is damaged, and must
    not be read with something else in their place.

    Raises:
        UsageError: the file is there and cannot be read: it is no plain one, a line of it has no end, or it is blank.
    """
    if not bounded_io.is_there(path):
        return
    with say_unreadable(path), bounded_io.open_plain(path) as file:
        for line in bounded_io.lines_of(file):
            if not line.isspace():
                yield line.decode("utf-8", errors="backslashreplace")


@contextlib.contextmanager
def say_unreadable(path: Path) -> Iterator[None]:
    """Meanwhile a refusal of the disk to read `path`, or what is there instead of it, is a `UsageError` with its
    remedy."""
    try:
        yield
    except bounded_io.NotReadableError as error:
        raise refusal_of(path, error) from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}. Make it readable, or restore it.") from None


def refusal_of(path: Path, error: bounded_io.NotReadableError) -> UsageError:
    """What to say of a file that no run has written."""
    return UsageError(f"{path}: cannot be read: {error}. Restore it, or remove it.")


def refuse_damaged(path: Path, lines: int) -> None:
    """Raises `UsageError` where so many lines of a file say nothing that none of our crashes has done it."""
    if lines > bounded_io.MOST_DAMAGED_LINES:
        error = bounded_io.NotReadableError(f"more than {bounded_io.MOST_DAMAGED_LINES:,} of its lines are damaged")
        raise refusal_of(path, error)


def check_appendable(path: Path) -> None:
    """Refuse what is there and is no file that lines can be added to; where nothing is there, one can be made.

    Raises:
        UsageError, InvalidRunError: a link that leads nowhere, a folder, a pipe, or what may not be written.
    """
    if not os.path.lexists(path):
        return
    with translate_write_errors(str(path), "Restore it, or remove it."):
        number = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(number).st_mode):
                raise OSError(errno.EINVAL, "it is no plain file")
        finally:
            os.close(number)


def sync_folder(folder: Path) -> None:
    """A new file is there after a crash only once its folder is on the disk; not every file system can be asked."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
