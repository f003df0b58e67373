"""A JSON document on disk that is there whole or not at all: a reader, or a crash, never finds half of one."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from lorameter.records import codec
from lorameter.records.journal import sync_folder


def write_document(path: Path, value: Any) -> None:
    """Write a value as JSON beside `path`, have it on the disk, and put it in the place of what was there.

    A character that UTF-8 cannot hold becomes "?", as in the files that only grow.

    Raises:
        OSError: the disk refuses; what was there is there.
    """
    write_whole(path, codec.dumps(value, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """The same with a text."""
    draft = path.with_suffix(".tmp")
    try:
        with draft.open("w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        error.filename = str(path)
        raise
    sync_folder(path.parent)
