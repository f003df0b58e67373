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

from lorameter.records import bounded_io
from lorameter.records.journal import sync_folder

_KEPT_LETTERS = 40
"""Of a name, in that of its draft: no name may be longer than 255 bytes."""


@contextlib.contextmanager
def replacing(target: Path, *, anew: bool = False) -> Iterator[Path]:
    """A path beside `target`, to be written to; at the end that file takes the place of what was there.

    After an error what was there is there, and nothing is beside it. A link stays one, and what it leads to is
    replaced. What is there and is no plain file, such as a pipe, is written to as it is. `anew`: nothing is replaced,
    and what came to be there meanwhile stays.

    Raises:
        OSError: the disk refuses; FileExistsError for what is there and is not to be replaced.
    """
    if bounded_io.is_there(target) and not bounded_io.is_file(target):
        yield target
        return
    place = Path(os.path.realpath(target))
    if bounded_io.is_file(place) and not os.access(place, os.W_OK):  # to put another in its place takes no such right
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
    draft = place.with_name(f".{place.name[:_KEPT_LETTERS]}.{secrets.token_hex(4)}.tmp")
    try:
        yield draft
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        if bounded_io.is_file(place):
            shutil.copymode(place, draft)
        if anew:
            _link(draft, place)
        else:
            draft.replace(place)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
    sync_folder(place.parent)


def _link(draft: Path, place: Path) -> None:
    """Give the draft its name, which one that is there refuses, as it does no renaming; where the disk knows no links,
    as good as can be."""
    try:
        os.link(draft, place)
    except FileExistsError:
        raise
    except OSError:
        if os.path.lexists(place):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place)) from None
        draft.replace(place)
    else:
        draft.unlink()
