"""Bounds for what somebody else's program or file may take of this process: the processor's time, and memory.

A template is a program, and a library that reads a file does what the file says. Neither knows how much is too much, so
the kernel is asked to: it counts the time that this process computes, whatever else the machine does, and refuses
memory beyond what is there already.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType


class OverTimeError(BaseException):
    """More time was computed than was given; no `except Exception` on its way may take it for one of its own."""


@contextlib.contextmanager
def time_limit(cpu_s: float) -> Iterator[None]:
    """Meanwhile this process may compute for so long. Nothing is limited but in the main thread, which alone is told.

    Raises:
        OverTimeError: where it is more. A call into C that looks at no signal comes to its end first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise OverTimeError

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def memory_limit(more_bytes: int) -> Iterator[None]:
    """Meanwhile this process may map so much more than it has: what asks for more gets a `MemoryError`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    least = min(limit for limit in (soft, hard, mapped + more_bytes) if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (least, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
