"""Resident pages of a process by mapping, as the kernel counts them (proc_pid_smaps(5)): libraries and mapped files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_SMAPS = Path("/proc/self/smaps")
_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \d+ *(.*)")


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
