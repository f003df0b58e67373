"""What a container may use and was refused: limits and counters of this process's cgroups, either version.

A quota is not a slower CPU: the scheduler lets every thread run until the period's share is spent and then stops all
of them for its rest (Documentation/scheduler/sched-bwc.rst of the kernel), so a step is fast or 0.1 s late.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lorameter.machine.reading import Reading, count_of, missing, read_file

UNCOUNTED = "no cgroup of this process counts what a quota withheld"
_UNLIMITED = "no cgroup limits the memory of this process"
_ABSENT = "not there"


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuTime:
    """CPU time of one cgroup since it was made, summed over all CPUs."""

    withheld_s: float
    """What its quota held back on CPUs that had work for it."""
    used_s: Reading[float]
    """What its processes had."""


def cpu_quota(root: Path) -> Reading[float]:
    """CPUs' worth of time that the tightest cgroup on the way up grants; missing where none sets a limit."""
    folders = _folders(root, "cpu", _membership(root))
    limits = [limit for folder in folders if (limit := _cpu_limit(folder)) is not None]
    return Reading(value=min(limits)) if limits else missing("no cgroup limits the CPU time of this process")


def _cpu_limit(folder: Path) -> float | None:
    """Of either version, which writes quota and period into one file or two; "max" and -1 are no limit."""
    both = read_file(folder / "cpu.max", lambda text: [count_of(word) for word in text.split()], _ABSENT).value
    if both is None:
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        found = [read_file(folder / name, count_of, _ABSENT).value for name in names]
        both = [number for number in found if number is not None]
    return both[0] / both[1] if len(both) == 2 and both[0] >= 0 and both[1] > 0 else None


class CpuTimes:
    """What the cgroups of this process were refused and had; asked again and again, it looks for them once.

    Which cgroups these are is read anew each time, and they are looked for again where that has changed.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._membership: str | None = None
        self._files: list[tuple[Path, Path]] = []

    def read(self) -> Reading[dict[str, CpuTime]]:
        """Of each cgroup on the way up that counts what its quota withheld, by its folder."""
        membership = _membership(self._root)
        if membership != self._membership:
            folders = _folders(self._root, "cpu", membership)
            self._membership, self._files = membership, [self._files_of(folder) for folder in folders]
        found: dict[str, CpuTime] = {}
        for counters, usage in self._files:
            fields = read_file(counters, _fields, _ABSENT).value or {}
            withheld = _withheld_s(fields)
            if withheld is not None:
                found[str(counters.parent)] = CpuTime(withheld_s=withheld, used_s=_used_s(fields, usage))
        return Reading(value=found) if found else missing(UNCOUNTED)

    def _files_of(self, folder: Path) -> tuple[Path, Path]:
        """Where a cgroup counts what its quota withheld, and where what it used.

        Version 2 counts both in one file, version 1 the second by a controller that may be mounted apart (cpuacct).
        """
        top = _top(self._root, "cpu")
        if not folder.is_relative_to(top):
            return folder / "cpu.stat", folder / "cpu.stat"
        return folder / "cpu.stat", _top(self._root, "cpuacct") / folder.relative_to(top) / "cpuacct.usage"


def memory_limit(root: Path) -> Reading[int]:
    """Bytes that the tightest cgroup on the way up grants; missing where none sets a limit."""
    limits = [limit for folder in _memory_folders(root) if (limit := _memory_limit(folder)) is not None]
    return Reading(value=min(limits)) if limits else missing(_UNLIMITED)


def memory_left(root: Path) -> Reading[int]:
    """Bytes that the tightest cgroup still grants, file pages that can be dropped counted as free."""
    left: list[int] = []
    for folder in _memory_folders(root):
        most = _memory_limit(folder)
        fields = read_file(folder / "memory.stat", _fields, _ABSENT).value or {}
        for usage, cached in (
            ("memory.current", "inactive_file"),
            ("memory.usage_in_bytes", "total_inactive_file"),
        ):
            used = read_file(folder / usage, count_of, _ABSENT).value
            if most is not None and used is not None:
                left.append(max(0, most - used + fields.get(cached, 0)))
    return Reading(value=min(left)) if left else missing(_UNLIMITED)


def _memory_folders(root: Path) -> list[Path]:
    return _folders(root, "memory", _membership(root))


def _memory_limit(folder: Path) -> int | None:
    """Of either version; "max" is no number and no limit."""
    limits = [read_file(folder / name, count_of, _ABSENT).value for name in ("memory.max", "memory.limit_in_bytes")]
    return next((limit for limit in limits if limit is not None), None)


def _withheld_s(fields: dict[str, int]) -> float | None:
    """Version 2 counts microseconds, version 1 nanoseconds, under different names; None where neither does."""
    if "throttled_usec" in fields:
        return fields["throttled_usec"] / 1e6
    return fields["throttled_time"] / 1e9 if "throttled_time" in fields else None


def _used_s(fields: dict[str, int], usage: Path) -> Reading[float]:
    if "usage_usec" in fields:
        return Reading(value=fields["usage_usec"] / 1e6)
    return read_file(usage, _nanoseconds, f"there is no {usage}, so the CPU time that this cgroup had is not known")


def _nanoseconds(text: str) -> float:
    return count_of(text) / 1e9


def _fields(text: str) -> dict[str, int]:
    return {name: count_of(value) for name, value in (line.split() for line in text.splitlines())}


def _membership(root: Path) -> str:
    return read_file(root / "proc/self/cgroup", str, _ABSENT).value or ""


def _top(root: Path, controller: str) -> Path:
    """Where a hierarchy of version 1 is mounted; version 2 has one for all controllers, under the name ""."""
    return root / "sys/fs/cgroup" / controller


def _folders(root: Path, controller: str, membership: str) -> list[Path]:
    """Folders of this process's cgroup for a controller, from its own up to the hierarchy's root.

    A container sees its own cgroup as the root of a hierarchy, under a name that is not there; the root stands last.
    """
    folders: list[Path] = []
    lines = (line.split(":", 2) for line in membership.splitlines())
    for _, controllers, name in (parts for parts in lines if len(parts) == 3):
        if controllers == "" or controller in controllers.split(","):
            top = _top(root, controllers and controller)
            own = top / name.strip("/")
            folders += [own, *own.parents][: len(own.parts) - len(top.parts) + 1]
    return [folder for folder in folders if os.path.isdir(folder)]  # noqa: PTH112 that of a Path raises for a long name
