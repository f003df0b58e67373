"""What the machine did to this process while something was timed: differences of the kernel's counters.

A timed step says how long it took, and not whether it was let run. Pressure stall information counts the time in which
runnable work waited for a CPU, for memory or for a disk (Documentation/accounting/psi.rst of the kernel); steal is what
a hypervisor gave to other guests; a quota is what a container's limit withheld; an involuntary switch is the scheduler
taking the CPU away. All are cumulative, so two readings tell everything between them and nothing runs beside the timed
code. Pressure and swapping are those of the whole machine.
"""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

from harness.meters.cgroup import quota_stall_s
from harness.meters.reading import Reading, missing, read_file

ROOT = Path("/")
NO_PRESSURE = "the kernel keeps no pressure stall information (CONFIG_PSI, or psi=1 on its command line)"
NO_FREQUENCY = "the kernel is not told the CPU's clock (no cpufreq), as is usual in a virtual machine"


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
    quota_stall_s: Reading[float]
    """As the cgroup counts it: over all CPUs that had work and were held back."""
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
    "quota_stall_s",
    "swap_in_bytes",
    "swap_out_bytes",
    "voluntary_switches",
    "involuntary_switches",
    "major_faults",
)


def host_counters(root: Path = ROOT) -> HostCounters:
    """Read them all; a file or a field that is not there leaves one of them missing."""
    cpus = os.sched_getaffinity(0)
    swapped = read_file(root / "proc/vmstat", _swapped, "there is no /proc/vmstat")
    used = resource.getrusage(resource.RUSAGE_SELF)  # /proc/self/status counts the switches of one thread only
    return HostCounters(
        taken_s=time.monotonic(),
        cpu_stall_s=pressure_s(root, "cpu"),
        memory_stall_s=pressure_s(root, "memory"),
        io_stall_s=pressure_s(root, "io"),
        steal_s=read_file(root / "proc/stat", lambda text: _steal_s(text, cpus), "there is no /proc/stat"),
        quota_stall_s=quota_stall_s(root),
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


class HostWatch:
    """What happened to the machine in the stretches between `begin` and `end`, added up over all of them.

    Both take a fraction of a millisecond and belong outside what is timed. Not shared between threads.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self._begun: HostCounters | None = None
        self._watched_s = 0.0
        self._sums: dict[str, float] = {}
        self._loads: list[float] = []
        self._clocks: list[float] = []
        self.missing: dict[str, str] = {}
        """Names of counters that this machine does not give, with the reason."""

    def begin(self) -> None:
        """Something timed is about to start."""
        self._begun = host_counters(self._root)

    def end(self) -> dict[str, float]:
        """It has ended: seconds, bytes and counts so far, by the names of `HostCounters`.

        Beside them `watched_s`, and the largest `load` and the extremes of the clock, `clock_min_hz` and
        `clock_max_hz`. Raises RuntimeError without `begin`.
        """
        if self._begun is None:
            raise RuntimeError("end() without begin(): nothing is being watched")
        last, first = host_counters(self._root), self._begun
        self._begun = None
        self._watched_s += last.taken_s - first.taken_s
        for name in CUMULATIVE:
            before, after = getattr(first, name), getattr(last, name)
            if before.value is None or after.value is None:
                self.missing[name] = before.reason or after.reason
            elif after.value < before.value:  # steal is known to, when a guest moves to another machine
                self.missing[name] = f"the counter went back from {before.value:g} to {after.value:g}"
            else:
                self._sums[name] = self._sums.get(name, 0.0) + after.value - before.value
        for name, found in (("load", self._loads), ("clock_hz", self._clocks)):
            reading: Reading[float] = getattr(last, name)
            if reading.value is None:
                self.missing[name] = reading.reason
            else:
                found.append(reading.value)
        return self._totals()

    def _totals(self) -> dict[str, float]:
        totals = {"watched_s": self._watched_s} | {
            name: value for name, value in self._sums.items() if name not in self.missing
        }
        if self._loads:
            totals["load"] = max(self._loads)
        if self._clocks:
            totals |= {"clock_min_hz": min(self._clocks), "clock_max_hz": max(self._clocks)}
        return totals


def _some_s(text: str) -> float:
    return int(text.split("some", 1)[1].split("total=", 1)[1].split()[0]) / 1e6


def _steal_s(text: str, cpus: set[int]) -> float:
    """Field 8 of the lines of these CPUs, in ticks (proc_stat(5))."""
    ticks = [
        int(fields[8])
        for fields in (line.split() for line in text.splitlines() if line.startswith("cpu"))
        if fields[0][3:].isdecimal() and int(fields[0][3:]) in cpus
    ]
    if not ticks:
        raise ValueError("none of the CPUs of this process")
    return sum(ticks) / os.sysconf("SC_CLK_TCK")


def _swapped(text: str) -> tuple[float, float]:
    """Bytes that came in and went out; the file counts pages."""
    fields = dict(line.split() for line in text.splitlines() if line.startswith("pswp"))
    page = os.sysconf("SC_PAGE_SIZE")
    return float(int(fields["pswpin"]) * page), float(int(fields["pswpout"]) * page)


def _clock(root: Path, cpus: set[int]) -> Reading[float]:
    speeds = [
        read_file(
            root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq",
            lambda text: int(text) * 1e3,
            NO_FREQUENCY,
        )
        for cpu in sorted(cpus)
    ]
    known = [speed.value for speed in speeds if speed.value is not None]
    return Reading(value=min(known)) if known else missing(speeds[0].reason if speeds else NO_FREQUENCY)
