"""What the machine did to this process while something was timed: differences of the kernel's counters.

A timed step says how long it took, and not whether it was let run. Pressure stall information counts the time in which
runnable work waited for a CPU, for memory or for a disk (Documentation/accounting/psi.rst of the kernel); steal is what
a hypervisor gave to other guests; a quota is what a container's limit withheld; an involuntary switch is the scheduler
taking the CPU away. All are cumulative, so two readings tell everything between them and nothing runs beside the timed
code. Pressure and swapping are those of the whole machine.

Pressure is time, and its share is of the time that was watched. Steal and quota are CPU time, added up over CPUs, and
so is what they are a share of: the CPU time that was asked for, which was either given or withheld. Over the wall
clock 0.5 % of 64 CPUs would read as 32 %.
"""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

from lorameter.machine.cgroup import CpuTime, cpu_times
from lorameter.machine.reading import Reading, count_of, missing, read_file

ROOT = Path("/")
NO_PRESSURE = "the kernel keeps no pressure stall information (CONFIG_PSI, or psi=1 on its command line)"
NO_FREQUENCY = "the kernel is not told the CPU's clock (no cpufreq), as is usual in a virtual machine"
GIVEN = {"steal_s": "busy_s", "quota_stall_s": "quota_used_s"}
"""CPU time that was withheld, and what was given over the same CPUs, by the names of `HostTelemetry`."""
LEAST_ASKED_S = 1.0
"""CPU time of which a share is given. The kernel counts steal in ticks of 10 ms, and of less than this a single one
would be more than the 1 % from which a share is worth a notice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCounters:
    """One look at the kernel's counters; all cumulative but the last two."""

    taken_s: float
    """On the monotonic clock."""
    cpu_stall_s: Reading[float]
    memory_stall_s: Reading[float]
    io_stall_s: Reading[float]
    steal_s: Reading[float]
    """Summed over the CPUs that this process may use."""
    busy_s: Reading[float]
    """What these CPUs computed, for this process and for others."""
    cgroups: Reading[dict[str, CpuTime]]
    """What each cgroup of this process was refused by its quota and had, by its folder."""
    swap_in_bytes: Reading[float]
    swap_out_bytes: Reading[float]
    voluntary_switches: Reading[float]
    involuntary_switches: Reading[float]
    major_faults: Reading[float]
    """Pages that had to be read from a disk; like the switches, of all threads of this process."""
    load: Reading[float]
    """Runnable and waiting processes, averaged over the last minute."""
    clock_hz: Reading[float]
    """Slowest of the CPUs that this process may use."""


CUMULATIVE = (
    "cpu_stall_s",
    "memory_stall_s",
    "io_stall_s",
    "steal_s",
    "busy_s",
    "swap_in_bytes",
    "swap_out_bytes",
    "voluntary_switches",
    "involuntary_switches",
    "major_faults",
)


def withheld_share(withheld_s: float | None, given_s: float | None) -> float | None:
    """Of the CPU time that was asked for, what was not given; None where either is unknown or both are too short."""
    if withheld_s is None or given_s is None or withheld_s + given_s < LEAST_ASKED_S:
        return None
    return withheld_s / (withheld_s + given_s)


def host_counters(root: Path = ROOT) -> HostCounters:
    """All counters; a file or field that is absent makes its counter missing."""
    cpus = os.sched_getaffinity(0)
    swapped = read_file(root / "proc/vmstat", _swapped, "there is no /proc/vmstat")
    times = read_file(root / "proc/stat", lambda text: _cpu_times(text, cpus), "there is no /proc/stat")
    used = resource.getrusage(resource.RUSAGE_SELF)  # /proc/self/status counts the switches of one thread only
    return HostCounters(
        taken_s=time.monotonic(),
        cpu_stall_s=pressure_s(root, "cpu"),
        memory_stall_s=pressure_s(root, "memory"),
        io_stall_s=pressure_s(root, "io"),
        steal_s=times.then(lambda both: both[1]),
        busy_s=times.then(lambda both: both[0]),
        cgroups=cpu_times(root),
        swap_in_bytes=swapped.then(lambda both: both[0]),
        swap_out_bytes=swapped.then(lambda both: both[1]),
        voluntary_switches=Reading(value=float(used.ru_nvcsw)),
        involuntary_switches=Reading(value=float(used.ru_nivcsw)),
        major_faults=Reading(value=float(used.ru_majflt)),
        load=load_average(root),
        clock_hz=_clock(root, cpus),
    )


def pressure_s(root: Path, resource_name: str) -> Reading[float]:
    """Seconds since the start of the machine in which some work waited for `cpu`, `memory` or `io`."""
    return read_file(root / "proc/pressure" / resource_name, _some_s, NO_PRESSURE)


def load_average(root: Path) -> Reading[float]:
    """Runnable and waiting processes, averaged over the last minute."""
    return read_file(root / "proc/loadavg", lambda text: float(text.split()[0]), "there is no /proc/loadavg")


class HostTelemetry:
    """What happened to the machine in the stretches between `begin` and `end`, added up over all of them.

    Both take a fraction of a millisecond and belong outside what is timed. Not shared between threads.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self._begun: HostCounters | None = None
        self._watched_s = 0.0
        self._counted = _Differences()
        self._cgroups: dict[str, _Differences] = {}
        self._loads: list[float] = []
        self._clocks: list[float] = []
        self.missing: dict[str, str] = {}
        """Names of counters that this machine does not give, with the reason."""

    def begin(self) -> None:
        """Something timed is about to start."""
        self._begun = host_counters(self._root)

    def end(self) -> dict[str, float]:
        """It has ended: seconds, bytes and counts so far, by the names of `HostCounters`.

        Beside them `watched_s`, the largest `load`, the extremes of the clock, `clock_min_hz` and `clock_max_hz`, and
        `quota_stall_s` and `quota_used_s` of the cgroup whose quota withheld most. Raises RuntimeError without `begin`.
        """
        if self._begun is None:
            raise RuntimeError("end() without begin(): nothing is being watched")
        last, first = host_counters(self._root), self._begun
        self._begun = None
        self._watched_s += last.taken_s - first.taken_s
        for name in CUMULATIVE:
            self._counted.add(name, getattr(first, name), getattr(last, name))
        self._add_cgroups(first.cgroups, last.cgroups)
        for name, found in (("load", self._loads), ("clock_hz", self._clocks)):
            reading: Reading[float] = getattr(last, name)
            if reading.value is None:
                self.missing[name] = reading.reason
            else:
                found.append(reading.value)
        return self._totals()

    def _add_cgroups(self, first: Reading[dict[str, CpuTime]], last: Reading[dict[str, CpuTime]]) -> None:
        before, after = first.value or {}, last.value or {}
        for folder in before.keys() & after.keys():
            differences = self._cgroups.setdefault(folder, _Differences())
            ours, theirs = before[folder], after[folder]
            differences.add("quota_stall_s", Reading(value=ours.withheld_s), Reading(value=theirs.withheld_s))
            differences.add("quota_used_s", Reading(value=ours.used_s), Reading(value=theirs.used_s))
        if not before.keys() & after.keys():
            reason = first.reason or last.reason or "this process was moved to another cgroup"
            self.missing |= dict.fromkeys(("quota_stall_s", "quota_used_s"), reason)

    def _totals(self) -> dict[str, float]:
        tightest = max(self._cgroups.values(), key=_Differences.withheld_s, default=_Differences())
        counted = self._counted.sums | tightest.sums
        self.missing |= self._counted.missing | tightest.missing
        totals = {"watched_s": self._watched_s} | {
            name: value for name, value in counted.items() if name not in self.missing
        }
        if self._loads:
            totals["load"] = max(self._loads)
        if self._clocks:
            totals |= {"clock_min_hz": min(self._clocks), "clock_max_hz": max(self._clocks)}
        return totals


class _Differences:
    """Cumulative counters as what they grew by over several stretches, or why that cannot be said."""

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
        """By a quota, as far as it is known: that of a cgroup."""
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
    """Of the slowest; missing where one of them does not tell, and then the others are not asked."""
    speeds: list[float] = []
    for cpu in sorted(cpus):
        file = root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq"
        speed = read_file(file, lambda text: count_of(text) * 1e3, NO_FREQUENCY)
        if speed.value is None:
            return speed
        speeds.append(speed.value)
    return Reading(value=min(speeds)) if speeds else missing(NO_FREQUENCY)
