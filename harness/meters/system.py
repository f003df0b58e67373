"""How the machine is set up: what does not change while something is measured, and decides what can be measured.

Each setting here is known to move times by itself: a governor that lets the clock fall between two turns, turbo that
lasts as long as the heat allows, huge pages that come and go with fragmentation, a process spread over memory nodes, a
container with a quota that stops every thread for the rest of a period.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from harness.meters.cgroup import cpu_quota, memory_left
from harness.meters.host import NO_FREQUENCY, ROOT, load_average
from harness.meters.neighbours import FIRST_PID_NAMESPACE
from harness.meters.reading import Reading, missing, read_file

_CPU = "sys/devices/system/cpu"
_CONTAINERS = ("docker", "kubepods", "containerd", "libpod", "lxc", "crio")


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemFacts:
    """Settings of the machine and limits of this process."""

    cpus: int
    """CPUs that this process may be scheduled on."""
    quota_cpus: Reading[float]
    """CPUs' worth of time that the tightest cgroup on the way up grants; missing where none limits it."""
    governor: Reading[str]
    turbo: Reading[bool]
    huge_pages: Reading[str]
    """Transparent huge pages: always, madvise or never."""
    numa_nodes: Reading[int]
    """Memory nodes that have CPUs which this process may use."""
    load: Reading[float]
    """Runnable and waiting processes, averaged over the last minute."""
    memory_bytes: Reading[int]
    memory_available_bytes: Reading[int]
    """What could be taken without swapping; under a cgroup's limit, what that leaves."""
    swap_bytes: Reading[int]
    swap_used_bytes: Reading[int]
    container: Reading[str]
    """How a container was recognised; missing where none was."""


def system_facts(root: Path = ROOT) -> SystemFacts:
    """Read them all; what is not there is missing with its reason."""
    cpus = os.sched_getaffinity(0)
    memory = root / "proc/meminfo"
    return SystemFacts(
        cpus=len(cpus),
        quota_cpus=cpu_quota(root),
        governor=read_file(root / f"{_CPU}/cpu{min(cpus)}/cpufreq/scaling_governor", str.strip, NO_FREQUENCY),
        turbo=_turbo(root),
        huge_pages=read_file(
            root / "sys/kernel/mm/transparent_hugepage/enabled",
            lambda text: text.split("[", 1)[1].split("]", 1)[0],
            "the kernel has no transparent huge pages",
        ),
        numa_nodes=_nodes(root, cpus),
        load=load_average(root),
        memory_bytes=read_file(memory, lambda text: _kibibytes(text, "MemTotal"), "there is no /proc/meminfo"),
        memory_available_bytes=_available(root, memory),
        swap_bytes=read_file(memory, lambda text: _kibibytes(text, "SwapTotal"), "there is no /proc/meminfo"),
        swap_used_bytes=read_file(
            memory,
            lambda text: _kibibytes(text, "SwapTotal") - _kibibytes(text, "SwapFree"),
            "there is no /proc/meminfo",
        ),
        container=_container(root),
    )


def _turbo(root: Path) -> Reading[bool]:
    """Intel's driver says whether turbo is off, every other one whether boost is on."""
    intel = read_file(root / f"{_CPU}/intel_pstate/no_turbo", lambda text: text.strip() == "0", NO_FREQUENCY)
    other = read_file(root / f"{_CPU}/cpufreq/boost", lambda text: text.strip() == "1", NO_FREQUENCY)
    return intel if intel.known else other


def _nodes(root: Path, cpus: set[int]) -> Reading[int]:
    folder = root / "sys/devices/system/node"
    nodes = sorted(folder.glob("node[0-9]*"))
    used = [node for node in nodes if cpus & (read_file(node / "cpulist", _list, "not there").value or set())]
    return Reading(value=len(used)) if used else missing("the kernel tells of no memory nodes")


def _list(text: str) -> set[int]:
    """CPUs of a list such as 0-3,8 (cpuset(7))."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _kibibytes(text: str, field: str) -> int:
    fields = {name: value for name, _, value in (line.partition(":") for line in text.splitlines())}
    return int(fields[field].split()[0]) * 1024


def _available(root: Path, memory: Path) -> Reading[int]:
    machine = read_file(memory, lambda text: _kibibytes(text, "MemAvailable"), "there is no /proc/meminfo")
    known = [left.value for left in (machine, memory_left(root)) if left.value is not None]
    return Reading(value=min(known)) if known else machine


def _container(root: Path) -> Reading[str]:
    for mark in (".dockerenv", "run/.containerenv"):
        if (root / mark).exists():
            return Reading(value=f"/{mark} is there")
    cgroup = read_file(root / "proc/self/cgroup", str, "there is no /proc/self/cgroup").value or ""
    if word := next((word for word in _CONTAINERS if word in cgroup), None):
        return Reading(value=f"the cgroup's name has {word!r} in it")
    try:
        own_numbers = os.readlink(root / "proc/self/ns/pid") != FIRST_PID_NAMESPACE  # noqa: PTH115 a link to no path
    except OSError:
        own_numbers = False
    return Reading(value="process numbers of its own") if own_numbers else missing("nothing looks like a container")
