"""On which CPU a process computes.

CPUs of one machine are not alike at every moment: another thread of the same core, of this machine or of one beside it
on the same host, takes from what runs there, and no counter of a virtual machine shows it. A process tends to stay
where it last ran, so that it would be slow as a whole and another, on the next CPU, would not. Processes whose times
are set against each other compute on the same one.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection
from pathlib import Path

LOOP = 400_000
"""Turns of the loop that says how fast a CPU is at this moment: some milliseconds."""
LOOPS = 3
"""The fastest of so many counts: what interrupts one of them is no property of the CPU."""


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


def benchmark_cpus(cpus: Collection[int]) -> dict[int, float]:
    """Seconds that a fixed loop takes on each of these CPUs now, in the calling thread; nothing of those on which it
    may not run."""
    before, found = os.sched_getaffinity(0), dict[int, float]()
    try:
        for cpu in cpus:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, {cpu})
                found[cpu] = min(_loop_s() for _ in range(LOOPS))
    finally:
        os.sched_setaffinity(0, before)
    return found


def _loop_s() -> float:
    begin = time.perf_counter()
    for _ in range(LOOP):
        pass
    return time.perf_counter() - begin
