"""Disturbances of a timed stretch by the machine, as differences of the kernel's counters.

Pressure stall information counts the time in which runnable work waited for a CPU, for memory or for a disk
(Documentation/accounting/psi.rst of the kernel); steal is CPU time that a hypervisor gave to other guests; a quota
withholds CPU time from a container; an involuntary switch takes the CPU from a thread. All are cumulative: two readings
cover the time between them, and nothing runs during the timed code. Pressure and swapping are the whole machine's.

Pressure is a share of the time that was watched. Steal and quota are CPU time, summed over CPUs, and a share of the CPU
time that was requested, given or withheld: as a share of wall time 0.5 % of 64 CPUs would read as 32 %.
"""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

from lorameter.machine.reading import Reading, count_of, missing, read_file

ROOT = Path("/")
NO_PRESSURE = "the kernel keeps no pressure stall information (CONFIG_PSI, or psi=1 on its command line)"
NO_FREQUENCY = "the kernel does not know the CPU's clock (no cpufreq), as is usual in a virtual machine"
GIVEN = {"steal_s": "busy_s", "quota_stall_s": "quota_used_s"}
"""Withheld CPU time, and that given on the same CPUs, by the names of `HostTelemetry`."""
LEAST_ASKED_S = 1.0
"""CPU time of which a share is given. The kernel counts steal in ticks of 10 ms, and of less than this a single one
would be more than the 1 % from which a share is worth a notice."""


LEVELS = ("load", "clock_hz")
"""Counters that are no sums: runnable processes averaged over the last minute, and the slowest of the CPUs that this
process may use."""


def withheld_share(withheld_s: float | None, given_s: float | None) -> float | None:
    """The withheld part of the CPU time that was requested; None if either is unknown or both are too short."""
    if withheld_s is None or given_s is None or withheld_s + given_s < LEAST_ASKED_S:
        return None
    return withheld_s / (withheld_s + given_s)


def host_counters(root: Path = ROOT) -> dict[str, Reading[float]]:
    """All counters by name; a file or field that is absent makes its counter missing. Steal and busy time are sums over
    the CPUs that this process may use; switches and major faults are those of all its threads."""
    cpus = os.sched_getaffinity(0)
    swapped = read_file(root / "proc/vmstat", _swapped, "there is no /proc/vmstat")
    times = read_file(root / "proc/stat", lambda text: _cpu_times(text, cpus), "there is no /proc/stat")
    used = resource.getrusage(resource.RUSAGE_SELF)  # /proc/self/status counts the switches of one thread only
    return {
        **{f"{name}_stall_s": pressure_s(root, name) for name in ("cpu", "memory", "io")},
        "steal_s": times.then(lambda both: both[1]),
        "busy_s": times.then(lambda both: both[0]),
        "swap_in_bytes": swapped.then(lambda both: both[0]),
        "swap_out_bytes": swapped.then(lambda both: both[1]),
        "voluntary_switches": Reading(value=float(used.ru_nvcsw)),
        "involuntary_switches": Reading(value=float(used.ru_nivcsw)),
        "major_faults": Reading(value=float(used.ru_majflt)),
        "load": load_average(root),
        "clock_hz": _clock(root, cpus),
    }


def pressure_s(root: Path, resource_name: str) -> Reading[float]:
    """Seconds since the start of the machine in which some work waited for `cpu`, `memory` or `io`."""
    return read_file(root / "proc/pressure" / resource_name, _some_s, NO_PRESSURE)


def load_average(root: Path) -> Reading[float]:
    """Runnable and waiting processes, averaged over the last minute."""
    return read_file(root / "proc/loadavg", lambda text: float(text.split()[0]), "there is no /proc/loadavg")


class HostTelemetry:
    """Counters of the machine over the stretches between `begin` and `end`, summed.

    Both take a fraction of a millisecond and belong outside what is timed. Not shared between threads.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self._begun: tuple[float, dict[str, Reading[float]], Reading[dict[str, CpuTime]]] | None = None
        self._watched_s = 0.0
        self._counted = _Differences()
        self._cgroups: dict[str, _Differences] = {}
        self._levels: dict[str, list[float]] = {name: [] for name in LEVELS}
        self.missing: dict[str, str] = {}
        """Names of counters that this machine does not offer, with the reason."""

    def begin(self) -> None:
        """Marks the begin of a timed stretch."""
        self._begun = time.monotonic(), host_counters(self._root), cpu_times(self._root)

    def end(self) -> dict[str, float]:
        """Marks its end and returns seconds, bytes and counts so far, by the names of `host_counters`.

        In addition `watched_s`, the largest `load`, `clock_min_hz` and `clock_max_hz`, and `quota_stall_s` and
        `quota_used_s` of the cgroup whose quota withheld most. Raises RuntimeError without `begin`.
        """
        if self._begun is None:
            raise RuntimeError("end() without begin(): nothing is being watched")
        (begun_s, first, cgroups), self._begun = self._begun, None
        last = host_counters(self._root)
        self._watched_s += time.monotonic() - begun_s
        for name in last:
            if name not in LEVELS:
                self._counted.add(name, first[name], last[name])
        for name, found in self._levels.items():
            if (value := last[name].value) is None:
                self.missing[name] = last[name].reason
            else:
                found.append(value)
        self._add_cgroups(cgroups, cpu_times(self._root))
        return self._totals()

    def _add_cgroups(self, first: Reading[dict[str, CpuTime]], last: Reading[dict[str, CpuTime]]) -> None:
        before, after = first.value or {}, last.value or {}
        for folder in before.keys() & after.keys():
            differences = self._cgroups.setdefault(folder, _Differences())
            for name, field in (("quota_stall_s", "withheld_s"), ("quota_used_s", "used_s")):
                values = [Reading(value=float(getattr(of[folder], field))) for of in (before, after)]
                differences.add(name, *values)
        if not before.keys() & after.keys():
            reason = first.reason or last.reason or "this process was moved to another cgroup"
            self.missing |= dict.fromkeys(("quota_stall_s", "quota_used_s"), reason)

    def _totals(self) -> dict[str, float]:
        tightest = max(self._cgroups.values(), key=_Differences.withheld_s, default=_Differences())
        counted = self._counted.sums | tightest.sums
        self.missing |= self._counted.missing | tightest.missing
        totals = {"watched_s": self._watched_s}
        totals |= {name: value for name, value in counted.items() if name not in self.missing}
        if load := self._levels["load"]:
            totals["load"] = max(load)
        if clocks := self._levels["clock_hz"]:
            totals |= {"clock_min_hz": min(clocks), "clock_max_hz": max(clocks)}
        return totals


class _Differences:
    """Increases of cumulative counters over several stretches, or why they are unknown."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.missing: dict[str, str] = {}

    def add(self, name: str, before: Reading[float], after: Reading[float]) -> None:
        if before.value is None or after.value is None:
            self.missing[name] = before.reason or after.reason
        elif after.value < before.value:  # steal is known to, when a guest moves to another machine
            self.missing[name] = f"the counter went back from {before.value:g} to {after.value:g}"
        else:
            self.sums[name] = self.sums.get(name, 0.0) + after.value - before.value

    def withheld_s(self) -> float:
        """Withheld by the quota of a cgroup, as far as it is known."""
        return self.sums.get("quota_stall_s", 0.0)


def _some_s(text: str) -> float:
    return count_of(text.split("some", 1)[1].split("total=", 1)[1].split()[0]) / 1e6


def _cpu_times(text: str, cpus: set[int]) -> tuple[float, float]:
    """Seconds for which these CPUs were busy, and that were stolen from them (proc_stat(5), in ticks).

    Busy is user, nice, system, irq and softirq; guests are in user already. The lines of the CPUs stand first.
    """
    ours = {f"cpu{cpu}" for cpu in cpus}
    ticks = [
        [count_of(field) for field in fields[1:9]]
        for fields in (line.split() for line in text.partition("\nintr")[0].splitlines())
        if fields and fields[0] in ours
    ]
    if not ticks:
        raise ValueError("none of the CPUs of this process")
    busy = sum(user + nice + system + irq + soft for user, nice, system, _, _, irq, soft, _ in ticks)
    tick = os.sysconf("SC_CLK_TCK")
    return busy / tick, sum(one[7] for one in ticks) / tick


def _swapped(text: str) -> tuple[float, float]:
    """Bytes that came in and went out; the file counts pages, between a hundred other things."""
    came, went = (count_of(text.partition(f"\n{name} ")[2].partition("\n")[0]) for name in ("pswpin", "pswpout"))
    page = os.sysconf("SC_PAGE_SIZE")
    return float(came * page), float(went * page)


def _clock(root: Path, cpus: set[int]) -> Reading[float]:
    """Of the slowest; missing if one of them does not report it."""
    speeds: list[float] = []
    for cpu in sorted(cpus):
        file = root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq"
        speed = read_file(file, lambda text: count_of(text) * 1e3, NO_FREQUENCY)
        if speed.value is None:
            return speed
        speeds.append(speed.value)
    return Reading(value=min(speeds)) if speeds else missing(NO_FREQUENCY)


# --- cgroups ----------------------------------------------------------------------------------------------------------
# Limits and counters of this process's cgroups (version 2), such as those of a container. A quota does not slow a CPU
# down: the scheduler lets every thread run until the period's share is used and then stops all of them for the rest of
# it (Documentation/scheduler/sched-bwc.rst of the kernel): a step is fast or 0.1 s late.

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
