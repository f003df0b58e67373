"""On which CPU a process computes.

CPUs of one machine are not alike at every moment: another thread of the same core, of this machine or of another guest
on the same host, takes from what runs there, and no counter of a virtual machine shows it. A process tends to stay
where it last ran, so that it would be slow as a whole and another, on the next CPU, would not. Processes whose times
are set against each other compute on the same one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path


def cpus_of(pid: int) -> tuple[int, ...]:
    """Those that a process may run on, in order; none where it is gone."""
    try:
        return tuple(sorted(os.sched_getaffinity(pid)))
    except OSError:
        return ()


def pin_to_cpus(pid: int, cpus: Collection[int]) -> None:
    """Have all threads of a process run on these CPUs only (sched_setaffinity(2)). Of one that is gone, or that is not
    ours to move, nothing happens."""
    with contextlib.suppress(OSError):
        for thread in list(Path(f"/proc/{pid}/task").iterdir()):
            with contextlib.suppress(OSError):  # a thread that has just ended
                os.sched_setaffinity(int(thread.name), cpus)


def has_children(pid: int) -> bool:
    """Whether a process has running children; true if that is unknown."""
    try:
        lists = [thread / "children" for thread in Path(f"/proc/{pid}/task").iterdir()]
        return any(one.read_text().strip() for one in lists)
    except OSError:
        return True
