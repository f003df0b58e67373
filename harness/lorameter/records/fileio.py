"""Files read within size limits, written as a whole, or appended to line by line.

What is read may be anything: a device without an end, or a terabyte. So the size of what is read is bounded here. What
is written is on the disk, whole, when a function returns: a reader or a crash never finds half of a document, and a
crash spoils one line of a journal at most.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lorameter.errors import UsageError
from lorameter.records import codec
from lorameter.records.codec import NotJsonError
from lorameter.records.os_errors import translate_write_errors

STUDY_BYTES = 1 << 20
"""Limit of what people write by hand: a study, a policy."""
CONFIG_BYTES = 16 << 20
"""Limit of what describes a model, a layer of a cache, the accepted runs."""
MANIFEST_BYTES = 64 << 20
"""Limit of a run's manifest, in which every planned trial is named."""
BENCHMARK_BYTES = 128 << 20
"""Limit of a file of pytest-benchmark, with all samples of all benchmarks in it."""
LINE_BYTES = 256 << 20
"""Limit of a line of a journal: the record of a trial with all of its samples, or a check."""
_DRAFT_LETTERS = 40
"""Characters of a file's name that its draft's name keeps: no name may be longer than 255 bytes."""


class NotReadableError(ValueError):
    """A file that cannot be used; the message says why, and the caller knows what it should have been."""


def is_file(path: Path | str) -> bool:
    """Whether a plain file is there; a name that no file can have, or that may not be looked at, names none."""
    return os.path.isfile(path)  # noqa: PTH113 that of a Path raises for a name that is too long


def is_folder(path: Path | str) -> bool:
    """Whether a folder is there, as `is_file`."""
    return os.path.isdir(path)  # noqa: PTH112 as above


def is_there(path: Path | str) -> bool:
    """Whether anything is there, as `is_file`."""
    return os.path.exists(path)  # noqa: PTH110 as above


# --- reading ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_plain(path: Path) -> Iterator[BinaryIO]:
    """A plain file, open for reading; a pipe or a device may never end, or never begin.

    Raises:
        NotReadableError: it is no plain file.
        OSError: there is none, or it may not be read.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # noqa: PTH123 a descriptor
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise NotReadableError("Is a directory" if stat.S_ISDIR(mode) else "it is no plain file")
        yield file


def read_text(path: Path, max_bytes: int) -> str:
    """The text of a file. Raises `NotReadableError` where there is none, or more than `max_bytes` of it."""
    try:
        with open_plain(path) as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise NotReadableError(f"it has more than the {max_bytes >> 20} MiB that are read of one")
        return content.decode("utf-8")
    except OSError as error:
        raise NotReadableError(error.strerror or str(error)) from None
    except ValueError as error:  # of a name that no file can have, of bytes that are no text
        raise NotReadableError(str(error)) from None


def read_json(path: Path, max_bytes: int) -> Any:
    """Plain data of a JSON file. Raises `NotReadableError`."""
    try:
        return codec.parse(read_text(path, max_bytes))
    except NotJsonError as error:
        raise NotReadableError(str(error)) from None


def read_toml(path: Path) -> dict[str, Any]:
    """Plain data of a TOML file that a person wrote. Raises `NotReadableError` with the remedy."""
    try:
        text = read_text(path, STUDY_BYTES)
    except NotReadableError as error:
        raise NotReadableError(f"cannot be read: {error}. Give a TOML file.") from None
    try:
        data = tomllib.loads(text)
        json.dumps(data)
    except RecursionError:
        raise NotReadableError("lists and tables are nested too deeply. Write fewer.") from None
    except ValueError as error:  # of text that is no TOML, of a number of thousands of digits
        raise NotReadableError(f"not a TOML file: {str(error).partition(';')[0]}. Mend the line named.") from None
    except TypeError:
        raise NotReadableError("a value is a date, and no key takes one. Write it in quotes.") from None
    return data


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a journal from the file's position on, each with what ends it. Raises `NotReadableError` for a line
    that is longer than `LINE_BYTES`."""
    while line := file.readline(LINE_BYTES + 1):
        if len(line) > LINE_BYTES:
            raise NotReadableError(f"one line has more than {LINE_BYTES >> 20} MiB")
        yield line


def journal_lines(path: Path) -> Iterator[str]:
    """The lines of a journal that are not blank, none where there is no file.

    Bytes that are no text read as "\\xff", which no JSON holds: the line is damaged, and must not be read with
    something else in their place.

    Raises:
        UsageError: the file is there and cannot be read: it is no plain one, or a line of it has no end.
    """
    if not is_there(path):
        return
    with explain_unreadable(path), open_plain(path) as file:
        for line in read_lines(file):
            if not line.isspace():
                yield line.decode("utf-8", errors="backslashreplace")


@contextlib.contextmanager
def explain_unreadable(path: Path) -> Iterator[None]:
    """Turns a refusal of the disk to read `path`, or what is there instead of it, into a `UsageError` with its
    remedy."""
    try:
        yield
    except NotReadableError as error:
        raise UsageError(f"{path}: cannot be read: {error}. Restore it, or remove it.") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}. Make it readable, or restore it.") from None


# --- writing ----------------------------------------------------------------------------------------------------------


def append(path: Path, text: str) -> None:
    """Add whole lines to a journal and wait until the disk has them; a line that a crash cut short before them stays a
    line of its own.

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


def write_document(path: Path, value: Any) -> None:
    """Write a value as JSON, as `write_whole` does."""
    write_whole(path, codec.dumps(value, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text, have it on the disk, and put it in the place of what was there.

    A character that UTF-8 cannot hold becomes "?", as in a journal.

    Raises:
        OSError: the disk refuses; what was there is there.
    """
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8", errors="replace")


@contextlib.contextmanager
def replacing(target: Path, *, anew: bool = False) -> Iterator[Path]:
    """A path next to `target`, to be written to; at the end that file replaces what was there.

    After an error the old file is unchanged, and no draft is left. A link stays one, and what it leads to is
    replaced. What is there and is no plain file, such as a pipe, is written to as it is.

    Args:
        target: may have an earlier file of that name, which is worth more than half of a new one.
        anew: whether to refuse to replace what is there.

    Raises:
        OSError: the disk refuses; FileExistsError for what is there and is not to be replaced.
    """
    if is_there(target) and not is_file(target):
        yield target
        return
    place = Path(os.path.realpath(target))
    if is_file(place) and not os.access(place, os.W_OK):  # to put another in its place takes no such right
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
    draft = place.with_name(f".{place.name[:_DRAFT_LETTERS]}.{secrets.token_hex(4)}.tmp")
    try:
        yield draft
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        if is_file(place):
            shutil.copymode(place, draft)
        if anew and os.path.lexists(place):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place))
        draft.replace(place)
    except BaseException as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(draft)):
            error.filename = str(target)
        raise
    sync_folder(place.parent)


def sync_folder(folder: Path) -> None:
    """Have a folder on the disk: a new file is there after a crash only then. Not every file system can be asked."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
