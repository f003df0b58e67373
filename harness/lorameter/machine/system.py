"""How the machine is set up: what does not change while something is measured, and decides what can be measured.

Each setting here is known to move times by itself: a governor that lets the clock fall between two turns, turbo that
lasts as long as the heat allows, huge pages that come and go with fragmentation, a process spread over memory nodes, a
container with a quota that stops every thread for the rest of a period.

A run writes them down once, with those of the GPU, as one document (`settings`), each with why it is not known: a
limit of 400 W on a GPU of 700, an ECC mode or a governor is not in any other log. What changes from moment to moment
(load, free memory, heat) is read around the timed stretches.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorameter.machine.cpus import holds_any
from lorameter.machine.gpus import has_own_pids
from lorameter.machine.host import (
    NO_FREQUENCY,
    ROOT,
    cpu_quota,
    host_counters,
    load_average,
    memory_left,
    memory_limit,
)
from lorameter.machine.nvml import device_session
from lorameter.machine.reading import Reading, missing, read_file, unavailable

_CPU = "sys/devices/system/cpu"
_CONTAINERS = ("docker", "kubepods", "containerd", "libpod", "lxc", "crio")
MOMENTARY = ("load", "memory_available_bytes", "swap_used_bytes")
"""Facts of the system that are no settings."""


def system_facts(root: Path = ROOT) -> dict[str, Reading[Any]]:
    """Settings of the machine and limits of this process; an absent one is missing with its reason.

    `cpus` are those that this process may run on, `quota_cpus` CPUs' worth of time that the tightest cgroup grants,
    `huge_pages` always, madvise or never, `numa_nodes` memory nodes with CPUs that this process may use, `container`
    how one was recognised.
    """
    cpus = os.sched_getaffinity(0)
    return {
        "cpus": Reading(value=len(cpus)),
        "quota_cpus": cpu_quota(root),
        "governor": read_file(root / f"{_CPU}/cpu{min(cpus)}/cpufreq/scaling_governor", str.strip, NO_FREQUENCY),
        "turbo": _turbo(root),
        "huge_pages": read_file(
            root / "sys/kernel/mm/transparent_hugepage/enabled",
            lambda text: text.split("[", 1)[1].split("]", 1)[0],
            "the kernel has no transparent huge pages",
        ),
        "numa_nodes": _nodes(root, cpus),
        "load": load_average(root),
        "memory_bytes": memory_bytes(root),
        "memory_available_bytes": memory_available_bytes(root),
        "swap_bytes": _meminfo(root, lambda fields: fields["SwapTotal"]),
        "swap_used_bytes": _meminfo(root, lambda fields: fields["SwapTotal"] - fields["SwapFree"]),
        "container": _container(root),
    }


def memory_bytes(root: Path = ROOT) -> Reading[int]:
    """The most memory that this process can have: the machine's, or a cgroup's limit where that is less."""
    return _least(_meminfo(root, lambda fields: fields["MemTotal"]), memory_limit(root))


def memory_available_bytes(root: Path = ROOT) -> Reading[int]:
    """Memory that is available now without swapping: the machine's, or what a cgroup's limit leaves if that is less."""
    return _least(_meminfo(root, lambda fields: fields["MemAvailable"]), memory_left(root))


def _turbo(root: Path) -> Reading[bool]:
    """Intel's driver says whether turbo is off, every other one whether boost is on."""
    intel = read_file(root / f"{_CPU}/intel_pstate/no_turbo", lambda text: text.strip() == "0", NO_FREQUENCY)
    other = read_file(root / f"{_CPU}/cpufreq/boost", lambda text: text.strip() == "1", NO_FREQUENCY)
    return intel if intel.known else other


def _nodes(root: Path, cpus: set[int]) -> Reading[int]:
    lists = (root / "sys/devices/system/node").glob("node[0-9]*/cpulist")
    used = [one for one in lists if read_file(one, lambda text: holds_any(text, cpus), "").value]
    return Reading(value=len(used)) if used else missing("the kernel reports no memory nodes")


def _meminfo(root: Path, pick: Callable[[dict[str, int]], int]) -> Reading[int]:
    """Bytes out of /proc/meminfo, which counts in units of 1024 that it calls kB."""

    def picked(text: str) -> int:
        fields = (line.partition(":") for line in text.splitlines())
        return pick({name: int(value.split()[0]) * 1024 for name, _, value in fields})

    return read_file(root / "proc/meminfo", picked, "there is no /proc/meminfo")


def _least(machine: Reading[int], granted: Reading[int]) -> Reading[int]:
    known = [one for one in (machine, granted) if one.value is not None]
    return min(known, key=lambda one: one.value or 0, default=machine)


def _container(root: Path) -> Reading[str]:
    for mark in (".dockerenv", "run/.containerenv"):
        if (root / mark).exists():
            return Reading(value=f"/{mark} is there")
    cgroup = read_file(root / "proc/self/cgroup", str, "").value or ""
    if word := next((word for word in _CONTAINERS if word in cgroup), None):
        return Reading(value=f"the cgroup's name has {word!r} in it")
    if has_own_pids(root / "proc"):
        return Reading(value="process numbers of its own")
    return missing("nothing looks like a container")


def settings(*, gpu: bool, environment: Mapping[str, str] | None = None, root: Path = ROOT) -> dict[str, Any]:
    """Of the machine (`system`), of its `gpu`, and which `host_counters_missing` there are, with the reason.

    Values are those of `system_facts` and `NvmlDevice.facts`, or "not available: REASON".

    Args:
        gpu: whether trials run on a GPU; if not, none is read.
        environment: of the trials, which says what GPU that is; None for this process's.
        root: where the files of the kernel are.
    """
    system = {name: one for name, one in system_facts(root).items() if name not in MOMENTARY}
    return {
        "system": plain_facts(system),
        "gpu": _gpu(environment) if gpu else unavailable("trials do not run on a GPU"),
        "host_counters_missing": {name: one.reason for name, one in host_counters(root).items() if not one.known},
    }


def _gpu(environment: Mapping[str, str] | None) -> dict[str, Any] | str:
    with device_session(environment) as gpu:
        return unavailable(gpu.reason) if gpu.value is None else plain_facts(gpu.value.facts())


def plain_facts(facts: Mapping[str, Reading[Any]]) -> dict[str, Any]:
    """Facts as a document: the value of each, or why there is none."""
    return {name: one.value_or_reason() for name, one in facts.items()}
