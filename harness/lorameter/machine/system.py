"""Reads the settings of the machine, which do not change during a measurement and determine what can be measured.

Each of these settings is known to affect times: a governor that reduces the clock between two turns, turbo that lasts
as long as the heat allows, huge pages that depend on fragmentation, a process spread over memory nodes, a container
whose quota stops every thread for the rest of a period.

A run records them once, with those of the GPU, as one document (`settings`), in which an unknown value has a reason: no
other log contains a limit of 400 W on a 700 W GPU, an ECC mode or a governor. Values that change from moment to moment
(load, free memory, heat) are read around the timed stretches.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorameter.machine.gpus import has_own_pids
from lorameter.machine.host import (
    NO_FREQUENCY,
    ROOT,
    cpu_quota,
    host_counters,
    memory_left,
    memory_limit,
)
from lorameter.machine.nvml import device_session
from lorameter.machine.processes import holds_any
from lorameter.machine.reading import Reading, missing, read_file, unavailable

_CPU = "sys/devices/system/cpu"
_CONTAINERS = ("docker", "kubepods", "containerd", "libpod", "lxc", "crio")
MOMENTARY = ("load", "memory_available_bytes", "swap_used_bytes")
"""Facts about the system that are not settings."""


def system_facts(root: Path = ROOT) -> dict[str, Reading[Any]]:
    """Settings of the machine and limits of this process; an unavailable one is missing, with a reason.

    `cpus` are the CPUs on which this process may run, `quota_cpus` is the CPU time that the tightest cgroup grants (in
    CPUs), `huge_pages` is always, madvise or never, `load` is the mean number of runnable processes over the last
    minute, `numa_nodes` are memory nodes with CPUs that this process may use, `container` says how a container was
    recognised.
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
        "load": read_file(root / "proc/loadavg", lambda text: float(text.split()[0]), "there is no /proc/loadavg"),
        "memory_bytes": memory_bytes(root),
        "memory_available_bytes": memory_available_bytes(root),
        "swap_bytes": _meminfo(root, lambda fields: fields["SwapTotal"]),
        "swap_used_bytes": _meminfo(root, lambda fields: fields["SwapTotal"] - fields["SwapFree"]),
        "container": _container(root),
    }


def memory_bytes(root: Path = ROOT) -> Reading[int]:
    """The maximum memory of this process: the machine's, or a cgroup's limit if that is lower."""
    return _least(_meminfo(root, lambda fields: fields["MemTotal"]), memory_limit(root))


def memory_available_bytes(root: Path = ROOT) -> Reading[int]:
    """Memory that is available without swapping: the machine's, or what is left below a cgroup's limit if that is
    lower."""
    return _least(_meminfo(root, lambda fields: fields["MemAvailable"]), memory_left(root))


def _turbo(root: Path) -> Reading[bool]:
    """Whether turbo is on: Intel's driver reports whether it is off, all other drivers whether boost is on."""
    intel = read_file(root / f"{_CPU}/intel_pstate/no_turbo", lambda text: text.strip() == "0", NO_FREQUENCY)
    other = read_file(root / f"{_CPU}/cpufreq/boost", lambda text: text.strip() == "1", NO_FREQUENCY)
    return intel if intel.known else other


def _nodes(root: Path, cpus: set[int]) -> Reading[int]:
    lists = (root / "sys/devices/system/node").glob("node[0-9]*/cpulist")
    used = [one for one in lists if read_file(one, lambda text: holds_any(text, cpus), "").value]
    return Reading(value=len(used)) if used else missing("the kernel reports no memory nodes")


def _meminfo(root: Path, pick: Callable[[dict[str, int]], int]) -> Reading[int]:
    """Bytes from /proc/meminfo, which counts in units of 1024 that it calls kB."""

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
    """Settings of the machine (`system`) and of its `gpu`, and the missing host counters (`host_counters_missing`) with
    the reasons.

    Values are those of `system_facts` and `NvmlDevice.facts`, or "not available: REASON".

    Args:
        gpu: whether trials run on a GPU; if not, no GPU is read.
        environment: environment of the trials, which determines their GPU; None for this process's.
        root: root folder of the kernel's files.
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
    """Facts as a document: the value of each, or why it is unavailable."""
    return {name: one.value_or_reason() for name, one in facts.items()}
