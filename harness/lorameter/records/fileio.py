"""Files: reading within a size limit, atomic writing, journals, locks and temporary folders.

An input may be an endless device or a terabyte, so only regular files are read, and at most `MAX_BYTES` of a document
or a line. When a function returns, its output is completely on disk: neither a reader nor a crash leaves half of a
document, and a crash damages at most one line of a journal.

Locks ensure that only one process makes a cached model, an environment or a run.

A temporary folder contains a file that its process keeps locked until it ends in any way: a process that makes a folder
first removes those of dead processes. A folder without that file belongs to another program, or is being made, and is
not removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import pwd
import secrets
import shutil
import stat
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lorameter.errors import InvalidRunError, UsageError
from lorameter.records import codec
from lorameter.records.codec import NotReadableError

MAX_BYTES = 256 << 20
"""Limit of a document or of a line of a journal; a pytest-benchmark file with all samples has some 100 MiB."""
_DRAFT_LETTERS = 40
"""Maximum characters of a file's name in its draft's name, because names are limited to 255 bytes."""


is_file, is_folder, is_there = os.path.isfile, os.path.isdir, os.path.exists
"""False for an invalid or inaccessible name; the methods of `Path` raise for a name that is too long."""


# --- reading ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_plain(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading; a pipe or a device may never end, or never begin.

    Raises:
        NotReadableError: it is not a regular file.
        OSError: it does not exist, or must not be read.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # noqa: PTH123 a descriptor
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise NotReadableError("Is a directory" if stat.S_ISDIR(mode) else "it is not a regular file")
        yield file


def describe_other_writer(file: BinaryIO) -> str:
    """Who else may have written an open file, apart from this user; empty if nobody."""
    status = os.fstat(file.fileno())
    owner = str(status.st_uid)
    with contextlib.suppress(KeyError):  # a user of another machine
        owner = pwd.getpwuid(status.st_uid).pw_name
    if status.st_uid != os.geteuid():
        return f"it belongs to user {owner}"
    return f"users other than {owner} may write it" if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else ""


def read_text(path: Path, check: Callable[[BinaryIO], object] = lambda file: None) -> str:
    """The text of a regular file; `check` receives the open file first. Raises `NotReadableError` if there is none, it
    is too large, or it is not UTF-8."""
    try:
        with open_plain(path) as file:
            check(file)
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise NotReadableError(f"it has more than {MAX_BYTES >> 20} MiB, the limit")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise NotReadableError(error.strerror or str(error)) from None
    except ValueError as error:  # an invalid file name, or bytes that are not text
        raise NotReadableError(str(error)) from None


def hash_file(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, check: Callable[[BinaryIO], object] = lambda file: None) -> Any:
    """Plain data from a JSON file, as `read_text` reads it. Raises `NotReadableError`."""
    return codec.parse(read_text(path, check))


def read_toml(path: Path) -> dict[str, Any]:
    """Plain data from a hand-written TOML file. Raises `NotReadableError` with the remedy."""
    try:
        text = read_text(path)
    except NotReadableError as error:
        raise NotReadableError(f"cannot be read: {error}. Give a TOML file.") from None
    try:
        data = tomllib.loads(text)
        json.dumps(data)
    except RecursionError:
        raise NotReadableError("lists and tables are nested too deeply. Nest them less deeply.") from None
    except ValueError as error:  # not TOML, or a number with thousands of digits
        raise NotReadableError(f"not a TOML file: {str(error).partition(';')[0]}. Correct the named line.") from None
    except TypeError:
        raise NotReadableError("a value is a date, and no key accepts dates. Write it in quotes.") from None
    return data


def journal_lines(path: Path) -> Iterator[str]:
    """The lines of a journal that are not blank; none if there is no file.

    Bytes that are not text are read as "\\xff", which is never valid JSON: the line is damaged, and must not be read
    with a substitute.

    Raises:
        UsageError: the file exists but cannot be read, for example because it is not a regular file.
    """
    if not is_there(path):
        return
    try:
        with open_plain(path) as file:
            while line := file.readline(MAX_BYTES + 1):
                if len(line) > MAX_BYTES:
                    raise NotReadableError(f"one line has more than {MAX_BYTES >> 20} MiB")
                if not line.isspace():
                    yield line.decode("utf-8", errors="backslashreplace")
    except NotReadableError as error:
        raise UsageError(f"{path}: cannot be read: {error}. Restore it, or remove it.") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}. Make it readable, or restore it.") from None


# --- writing ----------------------------------------------------------------------------------------------------------


def append(path: Path, text: str) -> None:
    """Append whole lines to a journal and wait until they are on disk; an earlier line that a crash truncated stays a
    separate line.

    A character that UTF-8 cannot encode (a lone surrogate, as in a file name that is not text) becomes "?".

    Raises:
        OSError: writing failed; the file is unchanged.
    """
    with path.open("a+b", buffering=0) as file:
        begun = file.seek(0, os.SEEK_END)
        data = text.encode("utf-8", errors="replace")
        if begun:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                data = b"\n" + data
        try:
            while data:  # if the disk is full, a part may be written
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
    """Raise `UsageError` for an existing path to which lines cannot be appended: a broken link, a folder, a pipe, or a
    file that must not be written. A missing file can be created."""
    if os.path.lexists(path) and not (is_file(path) and os.access(path, os.R_OK | os.W_OK)):
        raise UsageError(f"{path}: cannot be written: it is not a writable file. Restore it, or remove it.")


def write_document(path: Path, value: Any, *, mode: int = 0o666) -> None:
    """Write a value as JSON, as `write_whole` does."""
    write_whole(path, codec.dumps(value, indent=1) + "\n", mode=mode)


def write_whole(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Write a text to disk, and atomically replace the old file. A new file has the bits of `mode` that the umask
    allows.

    A character that UTF-8 cannot encode becomes "?", as in a journal.

    Raises:
        OSError: writing failed; the old file is unchanged.
    """
    with replace_file(path, mode=mode) as draft:
        draft.write_text(text, encoding="utf-8", errors="replace")


@contextlib.contextmanager
def replace_file(target: Path, *, mode: int = 0o666) -> Iterator[Path]:
    """A path next to `target` for writing; at the end this file replaces the old one.

    After an error the old file is unchanged, and no draft is left. For a link, its target is replaced. An existing path
    that is not a regular file, such as a pipe, is written to directly.

    Raises:
        OSError: writing failed.
    """
    if is_there(target) and not is_file(target):
        yield target
        return
    place = Path(os.path.realpath(target))
    if is_file(place) and not os.access(place, os.W_OK):  # replacing it would not need this permission
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
    draft = place.with_name(f".{place.name[:_DRAFT_LETTERS]}.{secrets.token_hex(4)}.tmp")
    try:
        draft.touch(mode)
        yield draft
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        if is_file(place):
            shutil.copymode(place, draft)
        draft.replace(place)
    except BaseException as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(draft)):
            error.filename = str(target)
        raise
    sync_folder(place.parent)


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that a new file survives a crash. Not every file system supports this."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


DRAFT_SUFFIX = ".partial"


@contextlib.contextmanager
def draft_folder(folder: Path) -> Iterator[Path]:
    """Make a folder to be filled, which replaces `folder` at the end; after an exception nothing remains. The caller
    holds the lock of `folder`.

    Raises:
        OSError: writing failed.
    """
    draft = folder.with_name(f"{folder.name}{DRAFT_SUFFIX}")
    shutil.rmtree(draft, ignore_errors=True)  # left over from a killed process
    try:
        draft.mkdir(parents=True)
        yield draft
        shutil.rmtree(folder, ignore_errors=True)  # an incomplete folder
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


TEST_LOCK_S = 1.0
"""Maximum time for which a process that only tests the lock (`is_locked`) may delay one that wants it."""


@contextlib.contextmanager
def hold_lock(target: Path, busy: str, report: Callable[[str], object]) -> Iterator[None]:
    """Hold the lock of `target` during the block. If another process holds it, `report` gets the message `busy`; it may
    raise an exception, which ends the wait."""
    import filelock

    target.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(lock_file(target))
    try:
        with _unlogged():
            lock.acquire(timeout=TEST_LOCK_S)
    except filelock.Timeout:
        report(busy)
        with _unlogged():
            lock.acquire()
    try:
        yield
    finally:
        with _unlogged():
            lock.release()


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Keep filelock's messages of the block out of the log of the process, which may be that of a user's script."""
    logger = logging.getLogger("filelock")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def is_locked(target: Path) -> bool:
    """Whether a process holds the lock of `target`; a killed process holds no lock."""
    import filelock

    if not lock_file(target).is_file():
        return False
    try:
        with filelock.FileLock(lock_file(target)).acquire(timeout=0):
            return False
    except filelock.Timeout:
        return True
    except OSError:  # a read-only copy has no writer
        return False


def lock_file(target: Path) -> Path:
    """The lock file of a target."""
    return target.with_name(f"{target.name}.lock")


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
    try:
        remove_abandoned()
        folder = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
    except FileNotFoundError as error:  # tempfile's message, with all folders that it has tried
        raise InvalidRunError(
            f"{error.strerror}. Free space in one of them, or set TMPDIR to another folder."
        ) from None
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


def remove_abandoned() -> None:
    """Remove the folders that dead processes of this user have left in the current temporary directory."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # its process holds the lock, it is not ours, or another process removes it
            made = folder.lstat()
            if stat.S_ISDIR(made.st_mode) and made.st_uid == os.getuid():
                with (folder / OWNER).open("r+") as owner:
                    fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
