"""What can be measured of the host, and what of it would spoil a measurement."""

from __future__ import annotations

from collections.abc import Iterator

from lorameter.machine.disturbances import CONTENDED, NOTICED
from lorameter.machine.doctor.check import DoctorCheck, say
from lorameter.machine.doctor.survey import Survey
from lorameter.machine.host import GIVEN, LEAST_ASKED_S, withheld_share
from lorameter.machine.reading import unavailable
from lorameter.records.units import format_bytes
from lorameter.studies.workload import Workload

BUSY = 0.25
"""Load over the CPUs of this process, before it does anything, from which others are at work."""
COUNTERS: tuple[tuple[str, str, str], ...] = (
    ("pressure", "cpu_stall_s", "Start the kernel with psi=1."),
    ("steal", "steal_s", "Measure where /proc/stat can be read."),
    ("CPU clock", "clock_hz", "Only the machine itself knows it; compare trials that took turns."),
)
"""Meters by name, the counter that stands for each, and what would bring it."""
DISTURBANCES: tuple[tuple[str, str, float, str, str], ...] = (
    ("waiting", "cpu_stall_s", CONTENDED, "work waited for a CPU", "Stop other work on this machine."),
    ("paging", "memory_stall_s", NOTICED, "work waited for memory", "Free memory before measuring."),
)
"""Name, counter, the share of time from which it matters, who did what, and the remedy."""
WITHHELD: tuple[tuple[str, str, str, str], ...] = (
    ("stolen time", "steal_s", "the hypervisor ran others", "Use a machine or an instance of its own."),
    ("withheld time", "quota_stall_s", "the quota held work back", "Raise the quota, or use a cpuset instead."),
)
"""Name, counter, who did what, and the remedy; shares are of the CPU time that was asked for."""


def host_meters(found: Survey) -> Iterator[DoctorCheck]:
    """Which of the kernel's counters there are."""
    for name, counter, remedy in COUNTERS:
        why = found.host_missing.get(counter, "")
        yield DoctorCheck(
            about="measures",
            name=name,
            standing="note" if why else "good",
            found=unavailable(why) if why else "available",
            remedy=remedy if why else "",
        )
    yield DoctorCheck(
        about="measures",
        name="host peaks",
        standing="good" if found.peaks else "unfit",
        found="available" if found.peaks else "the kernel does not let this process reset its peak memory",
        remedy="" if found.peaks else "Run where /proc/self/clear_refs can be written.",
    )


def disturbances(found: Survey) -> Iterator[DoctorCheck]:
    """What others do to this machine now."""
    load, cpus, watched = found.system.load, found.system.cpus, found.host["watched_s"]
    busy = load.value is not None and load.value > BUSY * cpus
    stalled = found.host.get("cpu_stall_s")
    waits = stalled is None or stalled / watched > CONTENDED  # a load lags a minute behind; what is waited for does not
    taken = load.value is not None and load.value > cpus and waits
    remedy = "Stop other work; if it must stay, measure more replicates and trust only what took turns."
    yield DoctorCheck(
        about="spoils",
        name="load",
        standing="unfit" if taken else "bad" if busy else "good" if load.known else "note",
        found=say(
            load,
            lambda value: (
                f"{value:.2f} on {cpus} CPUs (above {BUSY * cpus:g} others are at work, above {cpus:g} they "
                "leave none free)"
            ),
        ),
        remedy=remedy if busy else "",
    )
    for name, counter, limit, what, remedy in DISTURBANCES:
        if counter in found.host:
            share = found.host[counter] / watched
            yield DoctorCheck(
                about="spoils",
                name=name,
                standing="bad" if share > limit else "good",
                found=f"{what} in {share:.0%} of {watched:.1f} s (above {limit:.0%} it matters)",
                remedy=remedy if share > limit else "",
            )
    yield from _withheld(found)


def _withheld(found: Survey) -> Iterator[DoctorCheck]:
    """What of the CPU time that was asked for was not given, to this process and to others on the same CPUs."""
    for name, counter, what, remedy in WITHHELD:
        if counter not in found.host:
            continue
        withheld, given = found.host[counter], found.host.get(GIVEN[counter])
        share = withheld_share(withheld, given)
        much = share is not None and share > NOTICED
        if given is None:
            said = unavailable(found.host_missing[GIVEN[counter]])
        elif share is None:
            said = f"only {withheld + given:.2f} s of CPU time were asked for, and {LEAST_ASKED_S:.0f} s tell a share"
        else:
            asked = f"{share:.0%} of {withheld + given:.1f} s of CPU time that were asked for"
            said = f"{what} for {asked} (above {NOTICED:.0%} it matters)"
        yield DoctorCheck(
            about="spoils",
            name=name,
            standing="bad" if much else "note" if share is None else "good",
            found=said,
            remedy=remedy if much else "",
        )


def settings(found: Survey) -> Iterator[DoctorCheck]:
    """What moves times by itself, and can be set."""
    system = found.system
    governor, turbo, pages = system.governor.value, system.turbo.value, system.huge_pages.value
    saving = governor not in (None, "performance")
    yield DoctorCheck(
        about="spoils",
        name="governor",
        standing="bad" if saving else "good" if governor else "note",
        found=say(system.governor, str),
        remedy="sudo cpupower frequency-set -g performance" if saving else "",
    )
    yield DoctorCheck(
        about="spoils",
        name="turbo",
        standing="good" if turbo is False else "note",
        found=say(system.turbo, lambda on: "on: the clock depends on heat and on neighbours" if on else "off"),
        remedy="echo 1 | sudo tee /sys/devices/system/cpu/intel_pstate/no_turbo (or 0 into cpufreq/boost)"
        if turbo
        else "",
    )
    yield DoctorCheck(
        about="spoils",
        name="huge pages",
        standing="note" if pages == "always" else "good",
        found=say(
            system.huge_pages, lambda mode: f"{mode}: which process gets one is luck" if mode == "always" else mode
        ),
        remedy="echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled" if pages == "always" else "",
    )
    spread = (system.numa_nodes.value or 1) > 1
    yield DoctorCheck(
        about="spoils",
        name="memory nodes",
        standing="bad" if spread else "good",
        found=say(system.numa_nodes, lambda count: f"this process may run on {count}"),
        remedy="numactl --cpunodebind=0 --membind=0 lorameter ..." if spread else "",
    )
    used, size = system.swap_used_bytes.value or 0, system.swap_bytes.value
    yield DoctorCheck(
        about="spoils",
        name="swap",
        standing="bad" if used else "note" if size else "good",
        found=f"{format_bytes(used)} of {format_bytes(size)} in use"
        if size
        else say(system.swap_bytes, lambda _: "none"),
        remedy="sudo swapoff -a" if size else "",
    )


def limits(found: Survey) -> Iterator[DoctorCheck]:
    """What a container, or more threads than CPUs, would do to a trial."""
    system, threads = found.system, Workload().threads
    quota = system.quota_cpus.value
    usable = float(system.cpus) if quota is None else min(float(system.cpus), quota)
    yield DoctorCheck(
        about="spoils",
        name="threads",
        standing="unfit" if threads > usable else "good",
        found=f"{threads} a trial, {usable:g} CPUs' worth of time",
        remedy="Give it a whole CPU: less stops every thread in each period." if threads > usable else "",
    )
    if quota is not None:
        yield DoctorCheck(
            about="spoils",
            name="CPU quota",
            standing="bad",
            found=f"{quota:g} of {system.cpus} CPUs: what exceeds it waits for the next period",
            remedy="Use a cpuset (docker run --cpuset-cpus) instead of a quota.",
        )
    if system.container.known:
        yield DoctorCheck(
            about="spoils",
            name="container",
            standing="note",
            found=f"{system.container.value}: who else is on the machine is not seen",
            remedy="Look at the machine from outside before a result matters.",
        )
