"""Ending processes: the parent ends a worker that is silent, the zygote ends its children when it goes away, and a
measuring process ends with its parent, whatever becomes of that."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Iterable, Iterator

PARENT = "LORAMETER_PARENT"
"""The variable that tells a measuring process who started it."""
_PR_SET_PDEATHSIG = 1


def kill_group(pid: int) -> None:
    """Kill a process and whatever it started (compile workers); it may not have become its group's leader yet."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def end_with_parent(parent: int) -> None:
    """From now on the kernel kills this process when `parent` ends, and now if it has ended already: between a fork
    and this call nobody would have noticed."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def outlive_parent() -> None:
    """What `end_with_parent` asked for is off again: this process sees the end of its parent by itself."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)


@contextlib.contextmanager
def held_back(signals: Iterable[signal.Signals]) -> Iterator[Callable[[], None]]:
    """Meanwhile these signals wait. Gives what a child is to call before it becomes its program, for which they do not.

    What a signal's handler raises while Python forks is lost: it meets the functions that are called after a fork,
    whose errors are ignored.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield lambda: _set_mask(before)
    finally:
        _set_mask(before)


def _set_mask(blocked: Iterable[int]) -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def exit_words(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None:
        return "an unknown status"
    if code < 0:
        return f"signal {-code} ({signal.Signals(-code).name})"
    return f"exit code {code}"
