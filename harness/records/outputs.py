"""Files that somebody names for what a command writes: there whole or not at all.

Whoever names one may have an earlier one of that name, which is worth more than half of a new one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from harness.records import inputs
from harness.records.journal import sync_folder

_KEPT_LETTERS = 40
"""Of a name, in that of its draft: no name may be longer than 255 bytes."""


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path beside `target`, to be written to; at the end that file takes the place of what was there.

    After an error what was there is there, and nothing is beside it. A link stays one, and what it leads to is
    replaced. What is there and is no plain file, such as a pipe, is written to as it is.

    Raises:
        OSError: the disk refuses.
    """
    if inputs.is_there(target) and not inputs.is_file(target):
        yield target
        return
    place = Path(os.path.realpath(target))
    if inputs.is_file(place) and not os.access(place, os.W_OK):  # to put another in its place takes no such right
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
    draft = place.with_name(f".{place.name[:_KEPT_LETTERS]}.{secrets.token_hex(4)}.tmp")
    try:
        yield draft
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        if inputs.is_file(place):
            shutil.copymode(place, draft)
        draft.replace(place)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
    sync_folder(place.parent)
