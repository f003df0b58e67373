"""Checks of the host: what can run, what can be measured, and what would disturb a measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from lorameter.machine.disturbances import CONTENDED, NOTICED
from lorameter.machine.doctor.survey import OPTIONAL, REQUIRED, Survey
from lorameter.machine.host import GIVEN, LEAST_ASKED_S, withheld_share
from lorameter.machine.nvml import BUS_ORDER, ORDER_VARIABLE
from lorameter.machine.reading import Reading, unavailable
from lorameter.models import catalogue, shapes
from lorameter.models.costs.memory import bare_process_bytes, birth_bytes, estimate_memory
from lorameter.records.units import format_bytes
from lorameter.studies.variant import LoraVariant, Variant
from lorameter.studies.workload import Workload

V = TypeVar("V")
About = Literal["runs", "measures", "spoils"]
"""What can run · what can be measured · what would disturb it."""
Grade = Literal["good", "note", "bad", "unfit"]
"""Nothing to do · for information · costs precision, and can be remedied · do not measure here."""
BUSY = 0.25
"""Load per CPU, before this process does anything, from which other work is assumed."""
COUNTERS: tuple[tuple[str, str, str], ...] = (
    ("pressure", "cpu_stall_s", "Start the kernel with psi=1."),
    ("steal", "steal_s", "Measure where /proc/stat can be read."),
    ("CPU clock", "clock_hz", "Only the machine itself knows it; compare trials that took turns."),
)
"""Meters by name, the counter of each, and how to get it."""
DISTURBANCES: tuple[tuple[str, str, float, str, str], ...] = (
    ("waiting", "cpu_stall_s", CONTENDED, "work waited for a CPU", "Stop other work on this machine."),
    ("paging", "memory_stall_s", NOTICED, "work waited for memory", "Free memory before measuring."),
)
"""Name, counter, the share of time from which it matters, the event, and the remedy."""
WITHHELD: tuple[tuple[str, str, str, str], ...] = (
    ("stolen time", "steal_s", "the hypervisor ran others", "Use a machine or an instance of its own."),
    ("withheld time", "quota_stall_s", "the quota held work back", "Raise the quota, or use a cpuset instead."),
)
"""Name, counter, the event, and the remedy; shares are of the CPU time that was requested."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorCheck:
    """A finding, with its limit if there is one, and the remedy."""

    about: About
    name: str
    grade: Grade
    found: str
    remedy: str = ""


def in_words(reading: Reading[V], words: Callable[[V], str]) -> str:
    """The value in words, or why it is missing."""
    return unavailable(reading.reason) if reading.value is None else words(reading.value)


def setting(
    name: str, reading: Reading[V], words: Callable[[V], str], *, wrong: bool, grade: Grade, remedy: str
) -> DoctorCheck:
    """A value with `grade` and its remedy if it is wrong; a missing one is a note."""
    return DoctorCheck(
        about="spoils",
        name=name,
        grade=grade if wrong else "good" if reading.known else "note",
        found=in_words(reading, words),
        remedy=remedy if wrong else "",
    )


# --- what can run -----------------------------------------------------------------------------------------------------


def packages(found: Survey) -> Iterator[DoctorCheck]:
    """Required and optional distributions."""
    absent = [name for name in REQUIRED if found.packages.get(name) is None]
    versions = ", ".join(f"{name} {found.packages[name]}" for name in REQUIRED if name not in absent)
    yield DoctorCheck(
        about="runs",
        name="packages",
        grade="unfit" if absent else "good",
        found=f"missing: {', '.join(absent)}; installed: {versions}" if absent else versions,
        remedy=f"pip install {' '.join(absent)}" if absent else "",
    )
    for name, need in OPTIONAL.items():
        if found.packages.get(name) is None:
            remedy = f"Only for {need}: pip install 'lorameter[{name}]'."
            yield DoctorCheck(about="runs", name=name, grade="note", found=f"{name} is not installed", remedy=remedy)


def device(found: Survey) -> DoctorCheck:
    """Where trials run, and why not on the GPU."""
    machine, card = found.machine, found.card.value
    grade: Grade = "good"
    remedy = ""
    if machine.device == "cuda":
        size = "" if machine.device_memory_bytes is None else f", {format_bytes(machine.device_memory_bytes)}"
        said = f"{machine.device_name}{size}, driver {machine.driver}; torch is built for CUDA {machine.cuda}"
        if found.lacks_driver is not None:
            grade = "unfit"
            said += f"; NVML shows the GPU, and CUDA's driver cannot be loaded: {found.lacks_driver}"
            remedy = (
                "Start the container with NVIDIA_DRIVER_CAPABILITIES=compute,utility, or install all of the driver."
            )
    elif card is not None:
        grade = "bad"
        said = f"{in_words(card.facts.name, str)} is there, and torch is built for CPUs: trials run on the CPU"
        remedy = "Install torch for CUDA (pytorch.org, Get Started), or set CUDA_VISIBLE_DEVICES= to mean the CPU."
    elif machine.cuda is not None:
        grade = "note"
        said = f"{machine.cpu_model}: torch is built for CUDA {machine.cuda}, and no GPU is found ({found.card.reason})"
        remedy = "If there should be one, look at nvidia-smi, CUDA_VISIBLE_DEVICES and docker run --gpus."
    else:
        bf16 = "with" if machine.avx512_bf16 else "without"
        said = f"{machine.cpu_model} {bf16} AVX512-BF16, {machine.cpus} CPUs; torch is built for CPUs"
    return DoctorCheck(about="runs", name="device", grade=grade, found=said, remedy=remedy)


def device_order(found: Survey) -> Iterator[DoctorCheck]:
    """Whether CUDA counts different GPUs as trials do."""
    names = [str(card.name.value) for card in found.cards.value or ()]
    if len(set(names)) > 1 and found.environment.get(ORDER_VARIABLE) != BUS_ORDER:
        yield DoctorCheck(
            about="runs",
            name="device order",
            grade="note",
            found=f"GPUs differ ({', '.join(names)}): CUDA puts the fastest first, trials count along the bus",
            remedy=f"Choose by UUID (nvidia-smi -L) in CUDA_VISIBLE_DEVICES, or set {ORDER_VARIABLE}={BUS_ORDER}.",
        )


def memory(found: Survey) -> DoctorCheck:
    """Whether one trial's process would fit."""
    free, least = found.system.memory_available_bytes, bare_process_bytes(found.machine.cuda)
    little = free.value is not None and free.value < least
    return DoctorCheck(
        about="runs",
        name="memory",
        grade="unfit" if little else "good" if free.known else "note",
        found=in_words(
            free,
            lambda size: f"{format_bytes(size)} free; a trial takes {format_bytes(least)} before its model",
        ),
        remedy="Free memory, or raise the container's limit." if little else "",
    )


def models(found: Survey) -> Iterator[DoctorCheck]:
    """Models of the catalogue that fit into the free memory, by `lorameter.models.costs.memory`."""
    card, workload, where = found.card.value, Workload(), "cpu"
    free = found.system.memory_available_bytes
    if card is not None and found.machine.device == "cuda":
        free, where = card.memory.then(lambda memory: memory.free), "cuda"
    if free.value is None:
        return
    birth = birth_bytes(found.machine.cuda)
    plain, packed = (
        _fitting(LoraVariant(name=how, quantization=how), where, free.value, birth) for how in ("none", "nf4")
    )
    more = [name for name in packed if name not in plain]
    yield DoctorCheck(
        about="runs",
        name="models",
        grade="good" if packed else "note",
        found=f"LoRA: {', '.join(plain) or 'none'}; with a 4-bit base {', '.join(more) or 'no more'} too (estimated, "
        f"{workload.batch_size} × {workload.sequence_length} tokens a batch)",
        remedy="" if packed else "Free memory, or take a smaller model than the catalogue's.",
    )


def _fitting(variant: Variant, where: str, free: int, birth: int) -> list[str]:
    """Models that train in so many bytes, `birth` of them the process's before its model."""

    def needed(name: str) -> int:
        shape = shapes.shape(catalogue.resolve(f"{catalogue.RANDOM_PREFIX}{name}"))
        return estimate_memory(variant, Workload(), shape, device=where, process_bytes=birth).needed_bytes

    return [name for name in catalogue.CATALOGUE if needed(name) <= free]


def runs_folder(found: Survey) -> DoctorCheck:
    """Locks keep two runs in one folder from mixing."""
    locks = found.locks
    said = "locks work" if locks.value else locks.reason or "locks have no effect: two runs would not see each other"
    return DoctorCheck(
        about="runs",
        name="runs folder",
        grade="good" if locks.value else "bad",
        found=f"{found.runs}: {said}",
        remedy="" if locks.value else "Use a folder on a disk of this machine: --runs-dir, or LORAMETER_RUNS.",
    )


# --- what can be measured ---------------------------------------------------------------------------------------------


def host_meters(found: Survey) -> Iterator[DoctorCheck]:
    """Counters that the kernel offers."""
    for name, counter, remedy in COUNTERS:
        reason = found.host_missing.get(counter, "")
        yield DoctorCheck(
            about="measures",
            name=name,
            grade="note" if reason else "good",
            found=unavailable(reason) if reason else "available",
            remedy=remedy if reason else "",
        )
    yield DoctorCheck(
        about="measures",
        name="host peaks",
        grade="good" if found.peaks else "unfit",
        found="available" if found.peaks else "the kernel does not let this process reset its peak memory",
        remedy="" if found.peaks else "Run where /proc/self/clear_refs can be written.",
    )


# --- what would disturb a measurement ---------------------------------------------------------------------------------


def load(found: Survey) -> Iterator[DoctorCheck]:
    """Other work on the machine now."""
    load, cpus, watched = found.system.load, found.system.cpus, found.host["watched_s"]
    busy = load.value is not None and load.value > BUSY * cpus
    stalled = found.host.get("cpu_stall_s")
    waits = stalled is None or stalled / watched > CONTENDED  # a load lags a minute behind, waiting does not
    taken = load.value is not None and load.value > cpus and waits
    yield setting(
        "load",
        load,
        lambda value: (
            f"{value:.2f} on {cpus} CPUs (above {BUSY * cpus:g} others are at work, above {cpus:g} they "
            "leave none free)"
        ),
        wrong=busy,
        grade="unfit" if taken else "bad",
        remedy="Stop other work; if it must stay, measure more replicates and trust only what took turns.",
    )
    for name, counter, limit, what, remedy in DISTURBANCES:
        if counter in found.host:
            share = found.host[counter] / watched
            yield DoctorCheck(
                about="spoils",
                name=name,
                grade="bad" if share > limit else "good",
                found=f"{what} in {share:.0%} of {watched:.1f} s (above {limit:.0%} it matters)",
                remedy=remedy if share > limit else "",
            )
    for name, counter, what, remedy in WITHHELD:
        if counter in found.host:
            yield _withheld(found, name, counter, what, remedy)


def _withheld(found: Survey, name: str, counter: str, what: str, remedy: str) -> DoctorCheck:
    """CPU time that this process and others on the same CPUs requested and did not get."""
    withheld, given = found.host[counter], found.host.get(GIVEN[counter])
    share = withheld_share(withheld, given)
    much = share is not None and share > NOTICED
    if given is None:
        said = unavailable(found.host_missing[GIVEN[counter]])
    elif share is None:
        said = f"only {withheld + given:.2f} s of CPU time were requested; a share needs {LEAST_ASKED_S:.0f} s"
    else:
        requested = f"{share:.0%} of {withheld + given:.1f} s of CPU time that were requested"
        said = f"{what} for {requested} (above {NOTICED:.0%} it matters)"
    return DoctorCheck(
        about="spoils",
        name=name,
        grade="bad" if much else "note" if share is None else "good",
        found=said,
        remedy=remedy if much else "",
    )


def settings(found: Survey) -> Iterator[DoctorCheck]:
    """Settings that change times by themselves."""
    system = found.system
    slow = system.governor.value not in (None, "performance")
    remedy = "sudo cpupower frequency-set -g performance"
    yield setting("governor", system.governor, str, wrong=slow, grade="bad", remedy=remedy)
    yield setting(
        "turbo",
        system.turbo,
        lambda on: "on: the clock depends on heat and on neighbours" if on else "off",
        wrong=system.turbo.value is True,
        grade="note",
        remedy="echo 1 | sudo tee /sys/devices/system/cpu/intel_pstate/no_turbo (or 0 into cpufreq/boost)",
    )
    yield setting(
        "huge pages",
        system.huge_pages,
        lambda mode: f"{mode}: which process gets one is luck" if mode == "always" else mode,
        wrong=system.huge_pages.value == "always",
        grade="note",
        remedy="echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
    )
    yield setting(
        "memory nodes",
        system.numa_nodes,
        lambda count: f"this process may run on {count}",
        wrong=(system.numa_nodes.value or 1) > 1,
        grade="bad",
        remedy="numactl --cpunodebind=0 --membind=0 lorameter ...",
    )
    used = system.swap_used_bytes.value or 0
    yield setting(
        "swap",
        system.swap_bytes,
        lambda size: f"{format_bytes(used)} of {format_bytes(size)} in use" if size else "none",
        wrong=bool(system.swap_bytes.value),
        grade="bad" if used else "note",
        remedy="sudo swapoff -a",
    )


def limits(found: Survey) -> Iterator[DoctorCheck]:
    """Quotas, too many threads, and a container."""
    system, threads = found.system, Workload().threads
    quota = system.quota_cpus.value
    usable = float(system.cpus) if quota is None else min(float(system.cpus), quota)
    yield DoctorCheck(
        about="spoils",
        name="threads",
        grade="unfit" if threads > usable else "good",
        found=f"{threads} a trial, {usable:g} CPUs' worth of time",
        remedy="Give it a whole CPU: less stops every thread in each period." if threads > usable else "",
    )
    if quota is not None:
        yield DoctorCheck(
            about="spoils",
            name="CPU quota",
            grade="bad",
            found=f"{quota:g} of {system.cpus} CPUs: what exceeds it waits for the next period",
            remedy="Use a cpuset (docker run --cpuset-cpus) instead of a quota.",
        )
    if system.container.known:
        yield DoctorCheck(
            about="spoils",
            name="container",
            grade="note",
            found=f"{system.container.value}: other processes of the machine are not seen",
            remedy="Look at the machine from outside before a result matters.",
        )
