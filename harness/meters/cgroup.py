"""What a container may use and was refused: limits and counters of this process's cgroups, either version.

A quota is not a slower CPU: the scheduler lets every thread run until the period's share is spent and then stops all
of them for its rest (Documentation/scheduler/sched-bwc.rst of the kernel), so a step is fast or 0.1 s late.
"""

from __future__ import annotations

from pathlib import Path

from harness.meters.reading import Reading, missing, read_file

_ABSENT = "not there"


def cpu_quota(root: Path) -> Reading[float]:
    """CPUs' worth of time that the tightest cgroup on the way up grants; missing where none sets a limit."""
    limits: list[float] = []
    for folder in _folders(root, "cpu"):
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            texts = [read_file(folder / name, str.split, _ABSENT).value for name in names]
            words = [word for text in texts if text is not None for word in text]
            if len(words) == 2 and words[0] not in ("max", "-1"):
                limits.append(int(words[0]) / int(words[1]))
    return Reading(value=min(limits)) if limits else missing("no cgroup limits the CPU time of this process")


def quota_stall_s(root: Path) -> Reading[float]:
    """Seconds for which a quota has held work back, cumulative over all CPUs, of the cgroup where they are most."""
    found = [read_file(folder / "cpu.stat", _throttled_s, _ABSENT).value for folder in _folders(root, "cpu")]
    known = [seconds for seconds in found if seconds is not None]
    return Reading(value=max(known)) if known else missing("no cgroup of this process counts what a quota withheld")


def memory_left(root: Path) -> Reading[int]:
    """Bytes that the tightest cgroup still grants, file pages that can be dropped counted as free."""
    left: list[int] = []
    for folder in _folders(root, "memory"):
        for limit, usage, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            most = read_file(folder / limit, int, _ABSENT).value  # "max" is no number and no limit
            used = read_file(folder / usage, int, _ABSENT).value
            fields = read_file(folder / "memory.stat", _fields, _ABSENT).value or {}
            if most is not None and used is not None:
                left.append(max(0, most - used + fields.get(cached, 0)))
    return Reading(value=min(left)) if left else missing("no cgroup limits the memory of this process")


def _throttled_s(text: str) -> float:
    """Version 2 counts microseconds, version 1 nanoseconds, under different names."""
    fields = _fields(text)
    return fields["throttled_usec"] / 1e6 if "throttled_usec" in fields else fields["throttled_time"] / 1e9


def _fields(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in (line.split() for line in text.splitlines())}


def _folders(root: Path, controller: str) -> list[Path]:
    """Folders of this process's cgroup for a controller, from its own up to the hierarchy's root.

    A container sees its own cgroup as the root of a hierarchy, under a name that is not there; the root stands last.
    """
    lines = read_file(root / "proc/self/cgroup", str.splitlines, _ABSENT).value or []
    folders: list[Path] = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / ("" if controllers == "" else controller)
            own = top / name.strip("/")
            folders += [folder for folder in (own, *own.parents) if folder == top or top in folder.parents]
    return [folder for folder in folders if folder.is_dir()]
