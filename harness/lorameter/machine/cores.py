"""Which CPUs are threads of one core: what runs on one of them takes from what runs on the other."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable
from pathlib import Path

from lorameter.machine.reading import count_of

ROOT = Path("/sys/devices/system/cpu")
NAMES = ("core_cpus_list", "thread_siblings_list")
"""What the kernel calls the threads of a core, by its new name and by its old one
(Documentation/ABI/stable/sysfs-devices-system-cpu)."""


def cores_of(cpus: Iterable[int], root: Path = ROOT) -> list[tuple[int, ...]]:
    """CPUs by core, each core once, in the order of its first. Of a CPU whose core the kernel does not tell it is the
    only one."""
    found: dict[str, list[int]] = {}
    for cpu in sorted(cpus):
        found.setdefault(_core_of(cpu, root), []).append(cpu)
    return [tuple(of_one) for of_one in found.values()]


def _core_of(cpu: int, root: Path) -> str:
    """The list of its threads, which is the same for all of them."""
    for name in NAMES:
        with contextlib.suppress(OSError, ValueError):
            listed = (root / f"cpu{cpu}" / "topology" / name).read_text().strip()
            if holds_any(listed, {cpu}):
                return listed
    return f"of {cpu} alone"


def holds_any(listed: str, cpus: Collection[int]) -> bool:
    """Whether a list such as 0-3,8 (cpuset(7)) holds one of these CPUs. Raises `ValueError` for what is none."""
    parts = (part.partition("-") for part in listed.strip().split(",") if part)
    spans = [range(count_of(first), count_of(last or first) + 1) for first, _, last in parts]
    return any(cpu in span for cpu in cpus for span in spans)
