"""What the kernel and the interpreter say of a process's memory, each by its own count.

A resident set holds more than was asked for: pages of libraries and of mapped files that come in as they are touched
(proc_pid_smaps(5) counts them by mapping), and arenas from which the interpreter serves small objects. Neither is what
is left of the total: each is asked of who knows, so that something is left where they do not know all.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_SMAPS = Path("/proc/self/smaps")
_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \d+ *(.*)")
_ARENAS = re.compile(rb"(\d+) arenas \* (\d+) bytes/arena")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """Resident bytes of this process that are mapped from files, or that it runs as code."""

    files: Mapping[str, int]
    """By path."""
    generated_bytes: int
    """Of what may be run and is from no file: code that a library has made, as oneDNN does for each new shape."""
    ranges: tuple[tuple[int, int, str], ...]
    """First address, end and path of each mapping."""

    def file_at(self, address: int) -> str | None:
        """Path of the file that is mapped at an address; None if there is none."""
        return next((path for first, end, path in self.ranges if first <= address < end), None)


def read_pages() -> Pages:
    """Read /proc/self/smaps; some milliseconds."""
    files: dict[str, int] = {}
    ranges: list[tuple[int, int, str]] = []
    path, runs, generated = "", False, 0
    for line in _SMAPS.read_text().splitlines():
        if header := _HEADER.fullmatch(line):
            path, runs = header[4], "x" in header[3]
            if path.startswith("/"):
                ranges.append((int(header[1], 16), int(header[2], 16), path))
        elif line.startswith("Rss:"):
            size = int(line.split()[1]) * 1024
            if path.startswith("/"):
                files[path] = files.get(path, 0) + size
            elif runs and not path.startswith("["):  # the kernel's own pages have names in brackets
                generated += size
    return Pages(files=files, generated_bytes=generated, ranges=tuple(ranges))


def interpreter_bytes() -> int | None:
    """Bytes of the arenas that the interpreter serves its small objects from, by its own count.

    CPython prints it to the standard error of C only; None where it prints no such line, as with another allocator
    (PYTHONMALLOC) or interpreter, or where nothing can be taken down: it is one kind of an account of many.
    """
    report = getattr(sys, "_debugmallocstats", None)
    if report is None:
        return None
    try:
        with tempfile.TemporaryFile() as file:
            with _errors_into(file.fileno()):
                report()
            file.seek(0)
            found = _ARENAS.search(file.read())
    except OSError:  # no standard error to turn aside, or a full disk
        return None
    return int(found[1]) * int(found[2]) if found else None


@contextlib.contextmanager
def _errors_into(descriptor: int) -> Iterator[None]:
    """Have everything that goes to descriptor 2 go elsewhere meanwhile."""
    errors = os.dup(2)
    os.dup2(descriptor, 2)
    try:
        yield
    finally:
        os.dup2(errors, 2)
        os.close(errors)
