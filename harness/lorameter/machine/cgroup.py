"""Limits and counters of this process's cgroups (version 2), such as those of a container.

A quota does not slow a CPU down: the scheduler lets every thread run until the period's share is used and then stops
all of them for the rest of it (Documentation/scheduler/sched-bwc.rst of the kernel): a step is fast or 0.1 s late.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorameter.machine.reading import Reading, count_of, missing, read_file

UNCOUNTED = "no cgroup of this process counts what a quota withheld"
_UNLIMITED = "no cgroup limits the memory of this process"
_ABSENT = "not there"


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuTime:
    """CPU time of one cgroup since its creation, summed over all CPUs."""

    withheld_s: float
    """Withheld by its quota."""
    used_s: float


def cpu_quota(root: Path) -> Reading[float]:
    """CPUs that the tightest limit allows, in CPU seconds per second; missing without a limit."""
    found = [read_file(folder / "cpu.max", _quota, _ABSENT).value for folder in _folders(root)]
    limits = [limit for limit in found if limit is not None]
    return Reading(value=min(limits)) if limits else missing("no cgroup limits the CPU time of this process")


def cpu_times(root: Path) -> Reading[dict[str, CpuTime]]:
    """CPU time of each cgroup of this process that counts what its quota withheld, by its folder."""
    found = {str(folder): read_file(folder / "cpu.stat", _cpu_time, _ABSENT).value for folder in _folders(root)}
    known = {folder: time for folder, time in found.items() if time is not None}
    return Reading(value=known) if known else missing(UNCOUNTED)


def memory_limit(root: Path) -> Reading[int]:
    """Bytes that the tightest limit allows; missing without a limit."""
    limits = [limit for folder in _folders(root) if (limit := _number(folder / "memory.max")) is not None]
    return Reading(value=min(limits)) if limits else missing(_UNLIMITED)


def memory_left(root: Path) -> Reading[int]:
    """Bytes left below the tightest limit; file pages that can be dropped count as free."""
    left: list[int] = []
    for folder in _folders(root):
        limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
        if limit is not None and used is not None:
            cached = read_file(folder / "memory.stat", _fields, _ABSENT).value or {}
            left.append(max(0, limit - used + cached.get("inactive_file", 0)))
    return Reading(value=min(left)) if left else missing(_UNLIMITED)


def _folders(root: Path) -> list[Path]:
    """This process's cgroup and those above it. A container sees its own as the root, under a name that may not exist
    in its file system; the root is last."""
    top = root / "sys/fs/cgroup"
    lines = (read_file(root / "proc/self/cgroup", str, _ABSENT).value or "").splitlines()
    name = next((line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")), None)
    if name is None:
        return []
    own = top / name
    return [own, *own.parents][: len(own.parts) - len(top.parts) + 1]


def _number(path: Path) -> int | None:
    """None without the file, and for "max"."""
    return read_file(path, count_of, _ABSENT).value


def _quota(text: str) -> float:
    quota, period = text.split()
    return count_of(quota) / count_of(period)  # "max" is no number, and no limit


def _fields(text: str) -> dict[str, int]:
    return {name: count_of(value) for name, value in (line.split() for line in text.splitlines())}


def _cpu_time(text: str) -> CpuTime:
    fields = _fields(text)
    return CpuTime(withheld_s=fields["throttled_usec"] / 1e6, used_s=fields["usage_usec"] / 1e6)
