"""Ending processes: the parent ends a worker that is silent, the zygote ends its children when it goes away."""

from __future__ import annotations

import contextlib
import os
import signal


def kill_group(pid: int) -> None:
    """Kill a process and whatever it started (compile workers); it may not have become its group's leader yet."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
