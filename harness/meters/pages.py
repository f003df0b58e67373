"""What the kernel and the C library say of a process's memory: resident pages by mapping, and the heap from inside.

A resident set holds more than was asked for. Pages of libraries and of mapped files come in as they are touched
(proc_pid_smaps(5) counts them by mapping), and malloc keeps what was freed for the next request (mallinfo(3)). Both are
counted here by those who know, so that neither has to be guessed from what is left of the total.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_SMAPS = Path("/proc/self/smaps")
_STATM = Path("/proc/self/statm")
_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+ *(.*)")
_HEAP = "[heap]"
_SEGMENT_BYTES = 64 * 2**20
"""Other arenas than the first grow in segments that begin at a multiple of this (HEAP_MAX_SIZE of glibc's arena.c)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """Resident bytes of this process by what is mapped."""

    files: Mapping[str, int]
    """By path, of everything that is mapped from a file."""
    heap_bytes: int
    """Of malloc's arenas: the break segment, and the segments of other threads' arenas."""
    anonymous_bytes: int
    """Of what is mapped from no file and is not the heap: malloc's large blocks, the interpreter's arenas, stacks."""
    ranges: tuple[tuple[int, int, str], ...]
    """First address, end and path of each mapping of a file."""

    def file_at(self, address: int) -> str | None:
        """Path of the file that is mapped at an address; None if there is none."""
        return next((path for first, end, path in self.ranges if first <= address < end), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heap:
    """malloc's own count, in bytes: what it handed out, in its arenas and in mappings of their own."""

    arena_used_bytes: int
    mapped_bytes: int

    @property
    def used_bytes(self) -> int:
        """All that is handed out."""
        return self.arena_used_bytes + self.mapped_bytes


def read_pages() -> Pages:
    """Read /proc/self/smaps; some milliseconds."""
    files: dict[str, int] = {}
    ranges: list[tuple[int, int, str]] = []
    heap, anonymous, path, first = 0, 0, "", 0
    for line in _SMAPS.read_text().splitlines():
        if header := _HEADER.fullmatch(line):
            path, first = header[3], int(header[1], 16)
            if path.startswith("/"):
                ranges.append((first, int(header[2], 16), path))
        elif line.startswith("Rss:"):
            size = int(line.split()[1]) * 1024
            if path.startswith("/"):
                files[path] = files.get(path, 0) + size
            elif path == _HEAP or (not path and first % _SEGMENT_BYTES == 0):
                heap += size
            else:
                anonymous += size
    return Pages(files=files, heap_bytes=heap, anonymous_bytes=anonymous, ranges=tuple(ranges))


def resident_now() -> int:
    """Bytes of the resident set; some microseconds."""
    return int(_STATM.read_text().split()[1]) * _page_size()


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def read_heap() -> Heap | None:
    """malloc's own count, by glibc's mallinfo2 (2.33 or newer); None with another C library."""
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        return None
    ask.restype = _MallInfo
    told = ask()
    return Heap(arena_used_bytes=told.uordblks, mapped_bytes=told.hblkhd)


@functools.cache
def _page_size() -> int:
    import resource

    return resource.getpagesize()
