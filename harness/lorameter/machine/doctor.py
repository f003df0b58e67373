"""Surveys a machine before a measurement, and judges what it can run and measure, and what would disturb a measurement.

The survey computes for a second and watches the kernel's counters, because steal and quotas have an effect only on a
busy CPU. Everything else is read once. Neither torch nor a CUDA context is loaded.

Most disturbances only reduce precision: trials take turns, and intervals include the noise. A machine is unfit if no
trial can run, or if numbers would be wrong because of other processes, a GPU that throttles itself, or faulty memory.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorameter.machine.disturbances import CONTENDED, NOTICED, SHARED_INVALID_BYTES
from lorameter.machine.host import CPU_TIME_GIVEN, MIN_REQUESTED_S, HostTelemetry, system_facts, withheld_share
from lorameter.machine.nvml import PROTECTING, Neighbours, device_session, neighbours_of
from lorameter.machine.provenance import Machine, library_version, probe_machine
from lorameter.machine.reading import Reading, missing_reading, unavailable
from lorameter.models.costs.memory import bare_process_bytes
from lorameter.records.units import format_bytes
from lorameter.studies.workload import Workload

COMPUTE_S = 1.1 * MIN_REQUESTED_S
"""Seconds of computation: a little more than the minimum CPU time for a share."""
REQUIRED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
"""Distributions that every trial needs."""
OPTIONAL = {"flash-attn": "variants with attention = flash_attention_2", "gguf": "models in GGUF files"}
"""Distributions that only some studies need, and their purpose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSurvey:
    """The first visible device."""

    facts: Mapping[str, Reading[Any]]
    sample: Mapping[str, Reading[Any]]
    neighbours: Neighbours
    sliced: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """All facts of a survey."""

    machine: Machine
    system: Mapping[str, Reading[Any]]
    packages: Mapping[str, str | None]
    """Versions of distributions; None if not installed."""
    host: Mapping[str, float]
    """Counters of the kernel while this process computed (`lorameter.machine.host`)."""
    host_missing: Mapping[str, str]
    no_peaks: str
    """Why the peak of a process's resident memory cannot be measured; empty if it can."""
    gpu: Reading[GpuSurvey]
    runs: Path
    """Folder for runs, or its nearest existing ancestor."""
    locks: Reading[bool]
    """Whether file locks (flock) work there."""
    root: bool
    """Whether the user may change the GPU's settings."""
    lacks_driver: str | None = None
    """Why CUDA's driver library cannot be loaded although NVML shows a GPU; None if it can."""

    @property
    def cpus(self) -> int:
        """CPUs on which this process may run."""
        return int(self.system["cpus"].value or 1)


def survey(runs: Path) -> Survey:
    """Survey this machine and the folder for `runs`; keeps one CPU busy for a second."""
    system = system_facts()  # before the computation, which increases the load
    watch = HostTelemetry()
    watch.begin()
    end = time.monotonic() + COMPUTE_S
    while time.monotonic() < end:
        pass
    host = watch.end()
    with device_session() as session:
        gpu = session.then(
            lambda device: GpuSurvey(
                facts=device.facts(),
                sample=device.sample(),
                neighbours=neighbours_of(device, generations=0),
                sliced=device.sliced,
            )
        )
    folder = next(path for path in (runs.absolute(), *runs.absolute().parents) if os.path.isdir(path))  # noqa: PTH112 no error
    return Survey(
        machine=probe_machine(),
        system=system,
        packages={name: library_version(name) for name in (*REQUIRED, *OPTIONAL)},
        host=host,
        host_missing=watch.missing,
        no_peaks="" if os.access("/proc/self/clear_refs", os.W_OK) else "the kernel lets no process reset its peak",
        gpu=gpu,
        runs=folder,
        locks=_try_lock(folder),
        root=os.geteuid() == 0,
        lacks_driver=_driver_error() if gpu.known else None,
    )


def _try_lock(folder: Path) -> Reading[bool]:
    """Whether a second lock on a locked file is refused, tried with a temporary file."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".lorameter-lock-") as held, open(held.name) as second:  # noqa: PTH123 its path
            fcntl.flock(held, fcntl.LOCK_EX)
            try:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return Reading(value=True)
            return Reading(value=False)
    except OSError as error:
        return missing_reading(f"no lock can be tried in {folder}: {error.strerror}")


def _driver_error() -> str | None:
    """The loader's error for the library that CUDA programs need, which may be absent where NVML, another library of
    the driver, is present; None if it loads. No device is initialised."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return str(error)
    return None


# --- judgement --------------------------------------------------------------------------------------------------------

About = Literal["runs", "measures", "spoils"]
"""What can run · what can be measured · what would disturb a measurement."""
Grade = Literal["good", "note", "bad", "unfit"]
"""No problem · for information · reduces precision and can be fixed · no measurement is possible here."""
BUSY = 0.25
"""Load per CPU, before this process computes anything, above which other work is assumed."""
HOT_MARGIN_C = 5.0
"""Degrees below the slow-down temperature. A sensor of 1 °C resolution and a slow fan make a smaller gap random."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorCheck:
    """A finding, with its limit if there is one, and the remedy."""

    about: About
    name: str
    grade: Grade
    found: str
    remedy: str = ""


def examine(found: Survey) -> tuple[DoctorCheck, ...]:
    """All checks of a survey, in reading order."""
    return (
        *packages(found),
        device(found),
        check_memory(found),
        runs_folder(found),
        *check_counters(found),
        load(found),
        *waits(found),
        *check_settings(found),
        *check_limits(found),
        *gpu_settings(found),
    )


def is_fit(checks: tuple[DoctorCheck, ...]) -> bool:
    """Whether measurements are possible on this machine."""
    return all(check.grade != "unfit" for check in checks)


def _check(about: About, name: str, found: str, grade: Grade = "good", remedy: str = "") -> DoctorCheck:
    """A finding with its remedy, if something needs fixing."""
    return DoctorCheck(about=about, name=name, grade=grade, found=found, remedy="" if grade == "good" else remedy)


def _value(
    name: str,
    reading: Reading[Any],
    words: Callable[[Any], str],
    *,
    about: About = "spoils",
    wrong: Callable[[Any], bool],
    grade: Grade = "bad",
    remedy: str,
) -> DoctorCheck:
    """A value with `grade` and its remedy if it is wrong; a missing value gives a note without a remedy."""
    if reading.value is None:
        return _check(about, name, unavailable(reading.reason), "note")
    return _check(about, name, words(reading.value), grade if wrong(reading.value) else "good", remedy)


# --- what can run -----------------------------------------------------------------------------------------------------


def packages(found: Survey) -> list[DoctorCheck]:
    """Required and optional distributions."""
    absent = [name for name in REQUIRED if found.packages.get(name) is None]
    versions = ", ".join(f"{name} {found.packages[name]}" for name in REQUIRED if name not in absent)
    words = f"missing: {', '.join(absent)}; installed: {versions}" if absent else versions
    required = _check("runs", "packages", words, "unfit" if absent else "good", f"pip install {' '.join(absent)}")
    return [required] + [
        _check("runs", name, f"{name} is not installed", "note", f"Only for {need}: pip install 'lorameter[{name}]'.")
        for name, need in OPTIONAL.items()
        if found.packages.get(name) is None
    ]


def device(found: Survey) -> DoctorCheck:
    """The device on which trials run, and why it is not the GPU."""
    machine, gpu, remedy = found.machine, found.gpu.value, ""
    grade: Grade = "good"
    if machine.device == "cuda":
        size = "" if machine.device_memory_bytes is None else f", {format_bytes(machine.device_memory_bytes)}"
        words = f"{machine.device_name}{size}, driver {machine.driver}; torch is built for CUDA {machine.cuda}"
        if found.lacks_driver is not None:
            words += f"; NVML shows the GPU, and CUDA's driver cannot be loaded: {found.lacks_driver}"
            grade = "unfit"
            remedy = (
                "Start the container with NVIDIA_DRIVER_CAPABILITIES=compute,utility, or install all of the driver."
            )
    elif gpu is not None:
        words = f"{gpu.facts['name'].value_or_reason()} was found, but torch is built for CPUs: trials run on the CPU"
        grade = "bad"
        remedy = "Install torch for CUDA (pytorch.org, Get Started), or set CUDA_VISIBLE_DEVICES= to use the CPU."
    elif machine.cuda is not None:
        words = f"{machine.cpu_model}: torch is built for CUDA {machine.cuda}, and no GPU is found ({found.gpu.reason})"
        grade = "note"
        remedy = "If it has a GPU, check nvidia-smi, CUDA_VISIBLE_DEVICES and docker run --gpus."
    else:
        bf16 = "with" if machine.avx512_bf16 else "without"
        words = f"{machine.cpu_model} {bf16} AVX512-BF16, {machine.cpus} CPUs; torch is built for CPUs"
    return _check("runs", "device", words, grade, remedy)


def check_memory(found: Survey) -> DoctorCheck:
    """Whether the process of one trial would fit into memory."""
    free, least = found.system["memory_available_bytes"], bare_process_bytes(found.machine.cuda)
    return _value(
        "memory",
        free,
        lambda size: f"{format_bytes(size)} free; a trial takes {format_bytes(least)} before its model",
        about="runs",
        wrong=lambda size: size < least,
        grade="unfit",
        remedy="Free memory, or raise the container's limit.",
    )


def runs_folder(found: Survey) -> DoctorCheck:
    """Whether locks work in the folder of runs; they keep two runs from mixing."""
    without = found.locks.reason or "locks have no effect: two runs could write at the same time"
    words = f"{found.runs}: {'locks work' if found.locks.value else without}"
    remedy = "Use a folder on a disk of this machine: --runs-dir, or LORAMETER_RUNS."
    return _check("runs", "runs folder", words, "good" if found.locks.value else "bad", remedy)


# --- what can be measured ---------------------------------------------------------------------------------------------


def check_counters(found: Survey) -> list[DoctorCheck]:
    """Counters that the kernel and the GPU provide."""
    counters = [
        ("pressure", found.host_missing.get("cpu_stall_s"), "Start the kernel with psi=1."),
        ("steal", found.host_missing.get("steal_s"), "Measure where /proc/stat can be read."),
        ("host peaks", found.no_peaks, "Run where /proc/self/clear_refs can be written."),
    ]
    if gpu := found.gpu.value:
        sample, others = gpu.sample, gpu.neighbours.others
        counters += [
            ("energy", sample["energy_j"].reason, "Energy is left out of the results."),
            (
                "clock reasons",
                sample["events"].reason,
                "A newer driver may report them; clocks are recorded all the same.",
            ),
            ("throttled time", sample["thermal_slowdown_s"].reason, "Samples at the ends of turns replace it."),
            ("heat margin", sample["temperature_margin_c"].reason, "Watch the temperature with nvidia-smi."),
            ("neighbours", others.reason, "Run nvidia-smi outside the container, or start it with --pid=host."),
        ]
    return [
        _check(
            "measures",
            name,
            unavailable(reason) if reason else "available",
            ("unfit" if name == "host peaks" else "note") if reason else "good",
            remedy,
        )
        for name, reason, remedy in counters
    ]


# --- what would disturb a measurement ---------------------------------------------------------------------------------


def load(found: Survey) -> DoctorCheck:
    """Other work on the machine at this moment."""
    value, cpus, stalled = found.system["load"].value or 0.0, found.cpus, found.host.get("cpu_stall_s")
    waits = stalled is None or stalled / found.host["watched_s"] > CONTENDED  # the load average lags a minute behind
    return _value(
        "load",
        found.system["load"],
        lambda load: (
            f"{load:.2f} on {cpus} CPUs (above {BUSY * cpus:g} there is other work, above {cpus:g} no CPU is free)"
        ),
        wrong=lambda load: load > BUSY * cpus,
        grade="unfit" if value > cpus and waits else "bad",
        remedy="Stop other work; if it must stay, measure more replicates and trust only variants that took turns.",
    )


def waits(found: Survey) -> list[DoctorCheck]:
    """Work that waited while this process computed, and requested CPU time that was withheld."""
    checks, watched = [], found.host["watched_s"]
    for name, counter, limit, what, remedy in (
        ("waiting", "cpu_stall_s", CONTENDED, "work waited for a CPU", "Stop other work on this machine."),
        ("paging", "memory_stall_s", NOTICED, "work waited for memory", "Free memory before measuring."),
    ):
        if counter in found.host:
            share = found.host[counter] / watched
            words = f"{what} in {share:.0%} of {watched:.1f} s (above {limit:.0%} it matters)"
            checks.append(_check("spoils", name, words, "bad" if share > limit else "good", remedy))
    for name, counter, what, remedy in (
        ("stolen time", "steal_s", "the hypervisor ran other machines", "Use a dedicated machine or instance."),
        ("withheld time", "quota_stall_s", "the quota withheld CPU time", "Raise the quota, or use a cpuset instead."),
    ):
        if counter in found.host:
            withheld, given = found.host[counter], found.host.get(CPU_TIME_GIVEN[counter], 0.0)
            requested, part = f"{withheld + given:.1f} s of CPU time", withheld_share(withheld, given)
            words = f"only {requested} were requested; a share needs {MIN_REQUESTED_S:.0f} s"
            if part is not None:
                words = f"{what} for {part:.0%} of {requested} that were requested (above {NOTICED:.0%} it matters)"
            grade: Grade = "note" if part is None else "bad" if part > NOTICED else "good"
            checks.append(_check("spoils", name, words, grade, remedy if part is not None else ""))
    return checks


def check_settings(found: Survey) -> list[DoctorCheck]:
    """Settings that affect times."""
    system = found.system
    used = system["swap_used_bytes"].value or 0
    return [
        _value(
            "governor",
            system["governor"],
            str,
            wrong=lambda governor: governor != "performance",
            remedy="sudo cpupower frequency-set -g performance",
        ),
        _value(
            "turbo",
            system["turbo"],
            lambda on: "on: the clock depends on heat and on neighbours" if on else "off",
            wrong=bool,
            grade="note",
            remedy="echo 1 | sudo tee /sys/devices/system/cpu/intel_pstate/no_turbo (or 0 into cpufreq/boost)",
        ),
        _value(
            "huge pages",
            system["huge_pages"],
            lambda mode: f"{mode}: it depends on chance which process gets one" if mode == "always" else mode,
            wrong=lambda mode: mode == "always",
            grade="note",
            remedy="echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        ),
        _value(
            "memory nodes",
            system["numa_nodes"],
            lambda count: f"this process may run on {count}",
            wrong=lambda count: count > 1,
            remedy="numactl --cpunodebind=0 --membind=0 lorameter ...",
        ),
        _value(
            "swap",
            system["swap_bytes"],
            lambda size: f"{format_bytes(used)} of {format_bytes(size)} in use" if size else "none",
            wrong=bool,
            grade="bad" if used else "note",
            remedy="sudo swapoff -a",
        ),
    ]


def check_limits(found: Survey) -> list[DoctorCheck]:
    """Too many threads, quotas, and a container."""
    quota, container, threads = found.system["quota_cpus"].value, found.system["container"].value, Workload().threads
    usable = min(found.cpus, quota or found.cpus)
    words = f"{threads} a trial, {usable:g} CPUs' worth of time"
    remedy = "Give the container at least one whole CPU: with less, each thread is paused in every scheduling period."
    checks = [_check("spoils", "threads", words, "unfit" if threads > usable else "good", remedy)]
    if quota is not None:
        words = f"{quota:g} of {found.cpus} CPUs: work beyond it is paused until the next scheduling period"
        remedy = "Use a cpuset (docker run --cpuset-cpus) instead of a quota."
        checks.append(_check("spoils", "CPU quota", words, "bad", remedy))
    if container is not None:
        words = f"{container}: other processes of the machine are not visible"
        remedy = "For important results, check the load of the machine outside the container."
        checks.append(_check("spoils", "container", words, "note", remedy))
    return checks


def gpu_settings(found: Survey) -> list[DoctorCheck]:
    """Settings, heat and faults of the GPU, and other processes on it."""
    gpu = found.gpu.value
    if gpu is None:
        return []
    facts, default = gpu.facts, gpu.facts["default_power_limit_w"].value
    broken, corrected = facts["uncorrected_errors"].value or 0, facts["corrected_errors"].value or 0
    counts = f"; {broken} uncorrected and {corrected} corrected errors since the driver was loaded"
    reset_advice = "Reset the GPU (nvidia-smi -r) and look at its remapped rows (nvidia-smi -q)."
    sliced = "the device is a part of a GPU: others share its power, its heat and some of its bandwidth"
    return [
        _value(
            "persistence",
            facts["persistence"],
            lambda on: "on" if on else "off: the driver unloads between two processes",
            wrong=lambda on: not on,
            remedy="sudo nvidia-smi -pm 1",
        ),
        _value(
            "power limit",
            facts["power_limit_w"],
            lambda watts: f"{watts:.0f} W" + ("" if default is None else f" of {default:.0f} W by default"),
            wrong=lambda watts: default is not None and watts < default,
            remedy=f"sudo nvidia-smi -pl {default or 0:.0f}, or measure everything under this limit",
        ),
        _value(
            "clock lock",
            facts["clocks_need_root"],
            lambda need: "only root may lock the clocks" if need else "any user may",
            wrong=lambda need: need and not found.root,
            grade="note",
            remedy="Ask the administrator for nvidia-smi -lgc; otherwise the clock is recorded and not fixed.",
        ),
        *(
            [_check("spoils", "MIG", sliced, "note", "Use a whole GPU for results that describe one.")]
            if gpu.sliced
            else []
        ),
        _value(
            "throttling",
            gpu.sample["events"],
            lambda reasons: ", ".join(reasons) or "none",
            wrong=lambda reasons: bool(PROTECTING & set(reasons)),
            grade="unfit",
            remedy="Let the GPU cool down, check its power supply, and run doctor again.",
        ),
        _value(
            "heat",
            gpu.sample["temperature_margin_c"],
            lambda degrees: f"{degrees:.0f} °C below the slow-down (less than {HOT_MARGIN_C:.0f} °C is too close)",
            wrong=lambda degrees: degrees < HOT_MARGIN_C,
            remedy="Improve its cooling, or let it cool down.",
        ),
        _value(
            "ECC",
            facts["ecc"],
            lambda on: (
                ("on" if on else "off: a memory error would not be noticed") + (counts if broken or corrected else "")
            ),
            wrong=lambda on: bool(broken) or not on,
            grade="unfit" if broken else "note",
            remedy=reset_advice if broken else "sudo nvidia-smi -e 1",
        ),
        other_processes(gpu.neighbours),
    ]


def other_processes(neighbours: Neighbours) -> DoctorCheck:
    """This process holds nothing on the device, so all used memory belongs to others."""
    others, others_bytes, used = neighbours.others.value, neighbours.others_bytes.value, neighbours.used_bytes.value
    limit = f"above {format_bytes(SHARED_INVALID_BYTES)} they are assumed to be working"
    if others:
        size = "memory of unknown size" if others_bytes is None else format_bytes(others_bytes)
        words = f"{len(others)} on the device ({', '.join(map(str, others))}) hold {size}; {limit}"
        remedy = "End them, or choose a free GPU with CUDA_VISIBLE_DEVICES."
    elif neighbours.statement:
        size = "an unknown amount of memory" if used is None else format_bytes(used)
        words = f"{neighbours.statement}; {size} in use, {limit}"
        remedy = "Look at nvidia-smi outside the container, or give it the machine's process numbers (--pid=host)."
    else:
        return _check("spoils", "other processes", "none on the device")
    is_busy = max(others_bytes or 0, used or 0) > SHARED_INVALID_BYTES
    return _check("spoils", "other processes", words, "unfit" if is_busy else "bad", remedy)
