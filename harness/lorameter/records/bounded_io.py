"""Text that somebody else wrote, read within bounds: JSON, TOML, and whether a path leads to anything.

A file can be anything: a device without an end, a terabyte, a list in a list ten thousand deep, a whole number of a
million digits. Each of these breaks whoever reads it on, in a place of its own and long after it was read. So what
comes in is held against these bounds once, here, and whoever reads on meets plain data of bounded depth and size.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lorameter.errors import shorten
from lorameter.records import codec
from lorameter.records.codec import NotJsonError

STUDY_BYTES = 1 << 20
"""Of what people write by hand: a study, a policy."""
CONFIG_BYTES = 16 << 20
"""Of what describes a model, a layer of a cache, the accepted runs."""
MANIFEST_BYTES = 64 << 20
"""Of a run's manifest, in which every planned trial is named."""
BENCHMARK_BYTES = 128 << 20
"""Of a file of pytest-benchmark, with all samples of all benchmarks in it."""
LINE_BYTES = 256 << 20
"""Of a line of what a run writes down: the record of a trial with all of its samples, or a check."""
MOST_BLANK_LINES = 1_000_000
"""A run writes none; ten to each line of the largest run are an accident of whoever has copied it."""
MOST_DAMAGED_LINES = 100_000
"""As many as the largest run has trials; a crash spoils one."""

_KEY_PART = r"""(?:(?<![\w-])[\w-]+|"[^"\n]*"|'[^'\n]*')"""
_LONG_KEY = re.compile(rf"(?:{_KEY_PART}[ \t]*\.[ \t]*){{{codec.MOST_DEPTH}}}", re.ASCII)
"""A dotted key as deep as nothing may be: tomllib takes the square of its length, in time and in memory."""


_DEEP = f"lists and tables lie in one another more than {codec.MOST_DEPTH} deep. Write fewer."


class NotReadableError(ValueError):
    """A file that cannot be used; the message says why, and whoever asked knows what it should have been."""


def read_text(path: Path, most_bytes: int) -> str:
    """The text of a file. Raises `NotReadableError` where there is none, or more than `most_bytes` of it."""
    try:
        content = _read_bytes(path, most_bytes)
    except OSError as error:
        raise NotReadableError(error.strerror or str(error)) from None
    except ValueError as error:  # of a name that no file can have
        raise NotReadableError(str(error)) from None
    if len(content) > most_bytes:
        raise NotReadableError(f"it has more than the {most_bytes >> 20} MiB that are read of one")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotReadableError(str(error)) from None


@contextlib.contextmanager
def open_plain(path: Path) -> Iterator[BinaryIO]:
    """A plain file, open for reading; what is none may never end, or never begin.

    Raises:
        NotReadableError: it is none.
        OSError: there is none, or it may not be read.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # noqa: PTH123 a descriptor
        mode = os.fstat(file.fileno()).st_mode
        if stat.S_ISDIR(mode):
            raise NotReadableError("Is a directory")
        if not stat.S_ISREG(mode):
            raise NotReadableError("it is no plain file")
        yield file


def _read_bytes(path: Path, most_bytes: int) -> bytes:
    """The first bytes of a plain file, one more than may be there."""
    with open_plain(path) as file:
        return file.read(most_bytes + 1)


def lines_of(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file that only grows, from where it stands, each with what ends it.

    Raises:
        NotReadableError: one is longer than `LINE_BYTES`: nothing in it can be had, nor what comes behind it; or more
            than `MOST_BLANK_LINES` are blank.
    """
    blank = 0
    while line := file.readline(LINE_BYTES + 1):
        if len(line) > LINE_BYTES:
            raise NotReadableError(f"one line has more than {LINE_BYTES >> 20} MiB")
        blank += line.isspace()
        if blank > MOST_BLANK_LINES:
            raise NotReadableError(f"more than {MOST_BLANK_LINES:,} of its lines are blank")
        yield line


def read_json(path: Path, most_bytes: int) -> Any:
    """Plain data of a JSON file. Raises `NotReadableError`."""
    try:
        return codec.parse(read_text(path, most_bytes))
    except NotJsonError as error:
        raise NotReadableError(str(error)) from None


def read_toml(path: Path) -> dict[str, Any]:
    """Plain data of a TOML file that a person wrote.

    Raises:
        NotReadableError: with the remedy; also for a date, which no key takes.
    """
    try:
        text = read_text(path, STUDY_BYTES)
    except NotReadableError as error:
        raise NotReadableError(f"cannot be read: {error}. Give a TOML file.") from None
    if found := _LONG_KEY.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise NotReadableError(f"a key has {codec.MOST_DEPTH} parts or more (at line {line}). Use fewer.")
    try:
        data = tomllib.loads(text)
    except RecursionError:
        raise NotReadableError(_DEEP) from None
    except ValueError as error:  # of text that is no TOML, of a number of thousands of digits
        raise NotReadableError(f"not a TOML file: {str(error).partition(';')[0]}. Mend the line named.") from None
    for key, value, depth in _walk(data):
        if depth > codec.MOST_DEPTH:
            raise NotReadableError(_DEEP)
        if isinstance(value, datetime.date | datetime.time):
            raise NotReadableError(f"{shorten(key)} = {value}: a date, and no key takes one. Write it in quotes.")
        if isinstance(value, int) and abs(value) > codec.MOST_INTEGER:
            bits = value.bit_length()
            raise NotReadableError(
                f"{shorten(key)}: a whole number of {bits} bits, and 64 are read. Use a smaller one."
            )
    return data


def _walk(data: Any) -> Iterator[tuple[str, Any, int]]:
    """Every value in plain data, by its dotted key and with its depth, and without recursion."""
    left: list[tuple[str, Any, int]] = [("", data, 0)]
    while left:
        path, value, depth = left.pop()
        if path:
            yield path, value, depth
        if isinstance(value, dict):
            left += [(f"{path}.{key}".lstrip("."), item, depth + 1) for key, item in value.items()]
        elif isinstance(value, list):
            left += [(f"{path}[{index}]", item, depth + 1) for index, item in enumerate(value)]


def is_file(path: Path | str) -> bool:
    """Whether a plain file is there; a name that no file can have, or that may not be looked at, names none."""
    return os.path.isfile(path)  # noqa: PTH113 that of a Path raises for a name that is too long


def is_folder(path: Path | str) -> bool:
    """Whether a folder is there, as `is_file`."""
    return os.path.isdir(path)  # noqa: PTH112 as above


def is_there(path: Path | str) -> bool:
    """Whether anything is there, as `is_file`."""
    return os.path.exists(path)  # noqa: PTH110 as above
