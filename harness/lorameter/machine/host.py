"""Measures what the kernel counts (disturbances of a timed stretch, peaks of memory by phase), and reads the settings
of the machine.

Pressure stall information counts the time in which runnable work waited for a CPU, for memory or for a disk
(Documentation/accounting/psi.rst of the kernel); steal is CPU time that a hypervisor gave to other guests; a quota
withholds CPU time from a container; an involuntary switch takes the CPU from a thread. All counters are cumulative: two
readings cover the time between them, and no code runs during the timed stretch. Pressure and swapping are those of the
whole machine.

Pressure is a share of the watched time. Steal and quota are CPU time summed over CPUs, and are shares of the requested
CPU time (given plus withheld): as a share of wall time, 0.5 % on 64 CPUs would appear as 32 %.

A quota does not slow a CPU down: the scheduler lets every thread run until the share of the period is used, and then
stops all threads for the rest of the period (Documentation/scheduler/sched-bwc.rst), so a step is either fast or 0.1 s
late.

Peaks of memory are maxima, so they are reset at the start of each phase. On the host the peak is VmHWM, which the
kernel resets on request (`/proc/self/clear_refs`); `ru_maxrss` is unsuitable, because a forked child inherits its
parent's maximum. A forked child also maps its parent's pages, so its initial resident size is recorded as well.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorameter.machine.nvml import device_session
from lorameter.machine.reading import Reading, missing_reading, parse_fields, read_file, unavailable

ROOT = Path("/")
NO_PRESSURE = "the kernel does not record pressure stall information (CONFIG_PSI, or psi=1 on its command line)"
NO_FREQUENCY = "the kernel does not report the clock of the CPU (no cpufreq), as is usual in a virtual machine"
NO_QUOTA = "no cgroup of this process counts the CPU time that a quota withheld"


def host_counters(root: Path = ROOT) -> dict[str, Reading[float]]:
    """All counters by name; without its file or field, a counter is missing. Steal and busy time are sums over the CPUs
    that this process may use, switches are those of all its threads, a quota is that of the tightest cgroup."""
    cpus = os.sched_getaffinity(0)
    swapped = read_file(root / "proc/vmstat", _swapped_bytes, "there is no /proc/vmstat")
    times = read_file(root / "proc/stat", lambda text: _cpu_times(text, cpus), "there is no /proc/stat")
    quota = _quota_times(root)
    used = resource.getrusage(resource.RUSAGE_SELF)  # /proc/self/status counts the switches of only one thread
    return {
        "cpu_stall_s": read_file(root / "proc/pressure/cpu", _some_s, NO_PRESSURE),
        "memory_stall_s": read_file(root / "proc/pressure/memory", _some_s, NO_PRESSURE),
        "steal_s": times.then(lambda both: both[1]),
        "busy_s": times.then(lambda both: both[0]),
        "swap_in_bytes": swapped.then(lambda both: both[0]),
        "swap_out_bytes": swapped.then(lambda both: both[1]),
        "involuntary_switches": Reading(value=float(used.ru_nivcsw)),
        "quota_stall_s": quota.then(lambda both: both[0]),
        "quota_used_s": quota.then(lambda both: both[1]),
    }


def _some_s(text: str) -> float:
    """Seconds since boot in which some work waited."""
    return int(text.split("some", 1)[1].split("total=", 1)[1].split()[0]) / 1e6


def _cpu_times(text: str, cpus: set[int]) -> tuple[float, float]:
    """Seconds for which these CPUs were busy, and seconds stolen from them (proc_stat(5), in ticks).

    Busy is user, nice, system, irq and softirq; user already includes guests.
    """
    ours = {f"cpu{cpu}" for cpu in cpus}
    lines = [line.split() for line in text.partition("\nintr")[0].splitlines()]
    ticks = [[int(field) for field in fields[1:9]] for fields in lines if fields[0] in ours]
    if not ticks:
        raise ValueError("none of the CPUs of this process")
    busy = sum(user + nice + system + irq + soft for user, nice, system, _, _, irq, soft, _ in ticks)
    tick = os.sysconf("SC_CLK_TCK")
    return busy / tick, sum(fields[7] for fields in ticks) / tick


def _swapped_bytes(text: str) -> tuple[float, float]:
    """Bytes swapped in and out; the file counts pages."""
    pages = dict(line.split() for line in text.splitlines())
    page = os.sysconf("SC_PAGE_SIZE")
    return float(int(pages["pswpin"]) * page), float(int(pages["pswpout"]) * page)


# --- cgroups ----------------------------------------------------------------------------------------------------------
# Limits and counters of this process's cgroups (version 2), such as those of a container.


def cpu_quota(root: Path) -> Reading[float]:
    """CPUs that the tightest limit allows, in CPU seconds per second; missing if there is no limit."""
    limits = [limit for folder in _cgroups(root) if (limit := _quota_of(folder)) is not None]
    return Reading(value=min(limits)) if limits else missing_reading("no cgroup limits the CPU time of this process")


def _quota_times(root: Path) -> Reading[tuple[float, float]]:
    """Seconds of CPU time that the tightest quota withheld, and that its cgroup used, since the cgroup was created."""
    counting = [folder for folder in _cgroups(root) if (folder / "cpu.stat").is_file()]
    if not counting:
        return missing_reading(NO_QUOTA)
    tightest = min(counting, key=lambda folder: _quota_of(folder) or float("inf"))
    fields = read_file(tightest / "cpu.stat", _fields, NO_QUOTA).value or {}
    if not {"throttled_usec", "usage_usec"} <= fields.keys():
        return missing_reading(NO_QUOTA)
    return Reading(value=(fields["throttled_usec"] / 1e6, fields["usage_usec"] / 1e6))


def _cgroups(root: Path) -> list[Path]:
    """This process's cgroup and its ancestors, the root last. A container sees its own cgroup as the root, under a name
    that may not exist in its file system."""
    top = root / "sys/fs/cgroup"
    lines = (read_file(root / "proc/self/cgroup", str, "").value or "").splitlines()
    name = next((line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")), None)
    if name is None:
        return []
    own = top / name
    return [own, *own.parents][: len(own.parts) - len(top.parts) + 1]


def _quota_of(folder: Path) -> float | None:
    """The quota; None for "max", which means no limit."""

    def quota(text: str) -> float:
        share, period = text.split()
        return int(share) / int(period)

    return read_file(folder / "cpu.max", quota, "no limit").value


def _number(path: Path) -> int | None:
    """The number; None without the file, and for "max"."""
    return read_file(path, int, "no limit").value


def _fields(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in (line.split() for line in text.splitlines())}


def host_bytes(field: str) -> int:
    """A memory field of /proc/self/status in bytes: VmRSS (resident now) or VmHWM (peak since the last reset)."""
    fields = parse_fields(Path("/proc/self/status").read_text())
    if field not in fields:  # gVisor has no VmHWM
        raise ValueError(f"/proc/self/status has no {field}: host memory cannot be measured on this system")
    return int(fields[field].split()[0]) * 1024


class PeakMemoryTracker:
    """Peaks of one phase at a time: `begin` resets, `peaks` reads, both in the measured process."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._begun: dict[str, int] = {}

    def begin(self) -> None:
        """Start a phase: peaks count from now on."""
        Path("/proc/self/clear_refs").write_text("5")  # 5: reset only the peak resident set
        if self._cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self._begun = _shortages(torch.cuda.memory_stats())

    def peaks(self, phase: str) -> dict[str, int]:
        """Peak bytes since `begin`: `host_peak_PHASE_bytes`, and on CUDA three peaks of the allocator, each included in
        the next.

        `device_peak_allocated_PHASE_bytes` is memory of tensors. `device_peak_active_PHASE_bytes` also includes freed
        memory that cannot be reused yet because another stream still uses it. `device_peak_reserved_PHASE_bytes` is all
        memory that the allocator took from the device.

        On CUDA there are also two counts: `device_alloc_retries_PHASE`, how often the allocator released its cache and
        retried, which stalls the device, and `device_ooms_PHASE`, how often the retry failed.
        """
        peaks = {f"host_peak_{phase}_bytes": host_bytes("VmHWM")}
        if self._cuda:
            import torch

            stats = torch.cuda.memory_stats()
            for kind in ("allocated", "active", "reserved"):
                peaks[f"device_peak_{kind}_{phase}_bytes"] = int(stats[f"{kind}_bytes.all.peak"])
            peaks |= {f"device_{name}_{phase}": count - self._begun[name] for name, count in _shortages(stats).items()}
        return peaks


def _shortages(stats: Mapping[str, Any]) -> dict[str, int]:
    """Counts since the start of the process, from torch.cuda.memory_stats."""
    return {"alloc_retries": int(stats["num_alloc_retries"]), "ooms": int(stats["num_ooms"])}


# --- settings ---------------------------------------------------------------------------------------------------------
# They do not change during a measurement, and each is known to affect times: a governor that reduces the clock between
# two turns, turbo that lasts as long as the heat allows, huge pages that depend on fragmentation, a process spread over
# memory nodes, a container whose quota stops every thread for the rest of a period.

_CPU = "sys/devices/system/cpu"
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
    limits = [limit for folder in _cgroups(root) if (limit := _number(folder / "memory.max")) is not None]
    return _meminfo(root, lambda fields: min([fields["MemTotal"], *limits]))


def memory_available_bytes(root: Path = ROOT) -> Reading[int]:
    """Memory that is available without swapping: the machine's, or what is left below a cgroup's limit if that is
    lower; reclaimable file pages count as free."""
    left: list[int] = []
    for folder in _cgroups(root):
        limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
        if limit is not None and used is not None:
            cached = read_file(folder / "memory.stat", _fields, "").value or {}
            left.append(max(0, limit - used + cached.get("inactive_file", 0)))
    return _meminfo(root, lambda fields: min([fields["MemAvailable"], *left]))


def _turbo(root: Path) -> Reading[bool]:
    """Whether turbo is on: Intel's driver reports whether it is off, all other drivers whether boost is on."""
    intel = read_file(root / f"{_CPU}/intel_pstate/no_turbo", lambda text: text.strip() == "0", NO_FREQUENCY)
    other = read_file(root / f"{_CPU}/cpufreq/boost", lambda text: text.strip() == "1", NO_FREQUENCY)
    return intel if intel.known else other


def _nodes(root: Path, cpus: set[int]) -> Reading[int]:
    """The memory nodes of these CPUs; the kernel links each CPU to its node."""
    nodes = {link.name for cpu in cpus for link in (root / f"{_CPU}/cpu{cpu}").glob("node[0-9]*")}
    return Reading(value=len(nodes)) if nodes else missing_reading("the kernel reports no memory nodes")


def _meminfo(root: Path, pick: Callable[[dict[str, int]], int]) -> Reading[int]:
    """Bytes from /proc/meminfo, which counts in units of 1024 that it calls kB."""

    def pick_from(text: str) -> int:
        return pick({name: int(value.split()[0]) * 1024 for name, value in parse_fields(text).items()})

    return read_file(root / "proc/meminfo", pick_from, "there is no /proc/meminfo")


FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""The machine's own PID namespace (PROC_PID_INIT_INO in the kernel's proc_ns.h)."""


def _container(root: Path) -> Reading[str]:
    mark = next((mark for mark in (".dockerenv", "run/.containerenv") if (root / mark).exists()), None)
    if mark is not None:
        return Reading(value=f"/{mark} is there")
    with contextlib.suppress(OSError):
        if os.readlink(root / "proc/self/ns/pid") != FIRST_PID_NAMESPACE:  # noqa: PTH115 a link to no path
            return Reading(value="a PID namespace of its own")
    return missing_reading("nothing looks like a container")


def settings(*, gpu: bool, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Settings of the machine (`system`) and of its `gpu`, and the missing host counters (`host_counters_missing`) with
    the reasons.

    Values are those of `system_facts` and `NvmlDevice.facts`, or "not available: REASON".

    Args:
        gpu: whether trials run on a GPU; if not, no GPU is read.
        environment: environment of the trials, which determines their GPU; None for this process's.
    """
    system = {name: one for name, one in system_facts().items() if name not in MOMENTARY}
    gpu_facts: dict[str, Any] | str = unavailable("trials do not run on a GPU")
    if gpu:
        with device_session(environment) as device:
            gpu_facts = device.then(lambda one: plain_facts(one.facts())).value_or_reason()
    return {
        "system": plain_facts(system),
        "gpu": gpu_facts,
        "host_counters_missing": {name: one.reason for name, one in host_counters().items() if not one.known},
    }


def plain_facts(facts: Mapping[str, Reading[Any]]) -> dict[str, Any]:
    """Facts as a document: the value of each, or why it is unavailable."""
    return {name: reading.value_or_reason() for name, reading in facts.items()}
