"""What the operating system refuses (a full disk, no more descriptors), in words and with what to do about it.

It is no defect of lorameter and no fault of a trial. Whoever sees such a refusal ends as from a machine that cannot
measure, and what was measured before stays what it is.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator

from harness.errors import InvalidRunError

_SPACE = "Free space there"
REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EROFS: "Choose a folder that can be written",
    errno.EACCES: "Choose a folder that can be written",
    errno.EPERM: "Choose a folder that can be written",
    errno.EFBIG: "Raise the limit of file sizes (ulimit -f)",
    errno.EMFILE: "Raise the limit of open files (ulimit -n)",
    errno.ENFILE: "Close what has too many files open",
    errno.ENOMEM: "Free memory",
    errno.EAGAIN: "End other processes, or raise their limit (ulimit -u)",
    errno.EIO: "Check the disk",
    errno.ESTALE: "Check the disk",
    errno.ENAMETOOLONG: "Choose a shorter path",
    errno.ENOENT: "Restore what was there, and leave it alone while something is measured",
}
"""What to do about it, by the error's number."""


def words_of(error: OSError) -> str:
    """What was refused and what to do about it."""
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    return f"{what}. {REMEDIES.get(error.errno or 0, 'Check the disk')}"


@contextlib.contextmanager
def say_refused(told: Callable[[], tuple[str, str]]) -> Iterator[None]:
    """Meanwhile a refusal of the system is an `InvalidRunError`. `told` is asked then what it put an end to, and what
    to do once its cause is gone ("" for nothing)."""
    try:
        yield
    except (OSError, MemoryError) as error:
        said = words_of(error) if isinstance(error, OSError) else "this process ran out of memory. Free memory"
        where, then = told()
        raise InvalidRunError(f"{where}: {said}{', then ' if then else ''}{then}.") from error
