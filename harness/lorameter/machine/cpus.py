"""Pins processes to CPUs, and groups CPUs by core.

CPUs of one machine differ in speed at any moment: another thread on the same core, of this machine or of another guest
on the host, slows a CPU down, and no counter of a virtual machine shows it. A process tends to stay on its CPU, so one
process would be slow throughout, while another on the next CPU would not. So processes whose times are compared run on
the same CPU.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable
from pathlib import Path

ROOT = Path("/sys/devices/system/cpu")
NAMES = ("core_cpus_list", "thread_siblings_list")
"""The kernel's new and old name of the file that lists the threads of a core
(Documentation/ABI/stable/sysfs-devices-system-cpu)."""


def cpus_of(pid: int) -> tuple[int, ...]:
    """The CPUs on which a process may run, in order; empty if it has ended."""
    try:
        return tuple(sorted(os.sched_getaffinity(pid)))
    except OSError:
        return ()


def pin_to_cpus(pid: int, cpus: Collection[int]) -> None:
    """Restrict all threads of a process to these CPUs (sched_setaffinity(2)). Does nothing if the process has ended or
    this user may not change it."""
    with contextlib.suppress(OSError):
        for thread in list(Path(f"/proc/{pid}/task").iterdir()):
            with contextlib.suppress(OSError):  # a thread that has just ended
                os.sched_setaffinity(int(thread.name), cpus)


def has_children(pid: int) -> bool:
    """Whether a process has running children; True if unknown."""
    try:
        return any((thread / "children").read_text().strip() for thread in Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return True


def cores_of(cpus: Iterable[int], root: Path = ROOT) -> list[tuple[int, ...]]:
    """CPUs grouped by core, in the order of each core's first CPU. A CPU whose core is unknown forms its own group."""
    found: dict[str, list[int]] = {}
    for cpu in sorted(cpus):
        found.setdefault(_core_of(cpu, root), []).append(cpu)
    return [tuple(of_one) for of_one in found.values()]


def _core_of(cpu: int, root: Path) -> str:
    """The kernel's list of the threads of its core, which is the same for all of them."""
    for name in NAMES:
        with contextlib.suppress(OSError, ValueError):
            listed = (root / f"cpu{cpu}" / "topology" / name).read_text().strip()
            if holds_any(listed, {cpu}):
                return listed
    return f"of {cpu} alone"


def holds_any(listed: str, cpus: Collection[int]) -> bool:
    """Whether a list such as 0-3,8 (cpuset(7)) contains one of these CPUs. Raises `ValueError` for an invalid list."""
    parts = (part.partition("-") for part in listed.strip().split(",") if part)
    spans = [range(int(first), int(last or first) + 1) for first, _, last in parts]
    return any(cpu in span for cpu in cpus for span in spans)
