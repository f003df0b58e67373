"""Surveys a machine before a measurement, and judges what it can run and measure, and what would disturb a measurement.

The survey computes for a second and reads the telemetry of a trial around it, because steal and quotas have an effect
only on a busy CPU; the rules for trials judge the disturbances. Everything else is read once. Neither torch nor a CUDA
context is loaded.

Most disturbances only reduce precision: trials take turns, and intervals include the noise. A machine is unfit if no
trial can run, or if numbers would be wrong because of other processes, a GPU that throttles itself, or faulty memory.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorameter.machine.disturbances import CONTENDED, MIN_REQUESTED_S, judge
from lorameter.machine.host import system_facts
from lorameter.machine.nvml import device_session
from lorameter.machine.products import add_products, lacks_products
from lorameter.machine.provenance import Machine, library_version, probe_machine
from lorameter.machine.reading import Reading, missing_reading, unavailable
from lorameter.machine.telemetry import Telemetry, telemetry_key
from lorameter.models.costs.memory import bare_process_bytes
from lorameter.records.fileio import hold_lock, is_locked
from lorameter.records.units import format_bytes
from lorameter.studies.workload import Workload

COMPUTE_S = 1.1 * MIN_REQUESTED_S
"""Seconds of computation: a little more than the minimum CPU time for a share."""
PHASE = "survey"
"""The phase in the names of the survey's telemetry."""
REQUIRED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
"""Distributions that every trial needs."""
OPTIONAL = {"flash-attn": "variants with attention = flash_attention_2", "gguf": "models in GGUF files"}
"""Distributions that only some studies need, and their purpose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """All facts of a survey."""

    machine: Machine
    system: Mapping[str, Reading[Any]]
    packages: Mapping[str, str | None]
    """Versions of distributions; None if not installed."""
    telemetry: Mapping[str, float]
    """Telemetry while this process computed, by its names in a record."""
    missing: Mapping[str, str]
    """Counters of the kernel and the GPU that could not be read, with the reason."""
    no_peaks: str
    """Why the peak of a process's resident memory cannot be measured; empty if it can."""
    gpu: Reading[Mapping[str, Reading[Any]]]
    """Facts about the first visible GPU, and a sample of it."""
    runs: Path
    """Folder for runs, or its nearest existing ancestor."""
    locks: Reading[bool]
    """Whether file locks (flock) work there."""
    root: bool
    """Whether the user may change the GPU's settings."""
    lacks_driver: str | None = None
    """Why CUDA's driver library cannot be loaded although NVML shows a GPU; None if it can."""


def survey(runs: Path) -> Survey:
    """Survey this machine and the folder for `runs`; keeps one CPU busy for a second."""
    system = system_facts()  # before the computation, which increases the load
    with device_session() as device:
        meter = Telemetry(PHASE, lambda: device, generations=0)
        meter.begin()
        end = time.monotonic() + COMPUTE_S
        while time.monotonic() < end:
            pass
        telemetry = meter.end()
        gpu = device.then(lambda one: one.facts() | one.sample() | {"sliced": Reading(value=one.sliced)})
    folder = next(path for path in (runs.absolute(), *runs.absolute().parents) if os.path.isdir(path))  # noqa: PTH112 no error
    return Survey(
        machine=add_products(probe_machine()),
        system=system,
        packages={name: library_version(name) for name in (*REQUIRED, *OPTIONAL)},
        telemetry=telemetry,
        missing=meter.missing,
        no_peaks="" if os.access("/proc/self/clear_refs", os.W_OK) else "the kernel lets no process reset its peak",
        gpu=gpu,
        runs=folder,
        locks=_try_lock(folder),
        root=os.geteuid() == 0,
        lacks_driver=_driver_error() if gpu.known else None,
    )


def _try_lock(folder: Path) -> Reading[bool]:
    """Whether a lock that this process holds is visible to another attempt, tried in a temporary folder."""
    try:
        with (
            tempfile.TemporaryDirectory(dir=folder, prefix=".lorameter-lock-") as name,
            hold_lock(Path(name) / "target", "", print),
        ):
            return Reading(value=is_locked(Path(name) / "target"))
    except (OSError, NotImplementedError) as error:
        return missing_reading(f"no lock can be tried in {folder}: {error}")


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
        *check_products(found.machine),
        check_memory(found),
        runs_folder(found),
        *check_counters(found),
        load(found),
        *disturbances(found),
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
        words = f"{gpu['name'].value_or_reason()} was found, but torch is built for CPUs: trials run on the CPU"
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


def check_products(machine: Machine) -> list[DoctorCheck]:
    """The rate of a CPU's matrix products in each dtype."""
    if machine.device != "cpu":
        return []
    if not machine.gflops:
        return [_check("runs", "dtypes", "unknown: torch does not start", "note")]
    slow = [dtype for dtype in ("bfloat16", "float16") if lacks_products(machine, dtype)]
    rates = ", ".join(f"{dtype} {rate:.3g}" for dtype, rate in machine.gflops.items())
    emulated = f"; emulated: {', '.join(slow)}" if slow else ""
    words = f"GFLOP/s of a matrix product on one thread: {rates}{emulated}"
    remedy = 'Use dtype = "auto", which is float32 where bfloat16 is emulated.'
    return [_check("runs", "dtypes", words, "note" if "bfloat16" in slow else "good", remedy)]


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
        ("pressure", found.missing.get("cpu_stall_s"), "Start the kernel with psi=1."),
        ("steal", found.missing.get("steal_s"), "Measure where /proc/stat can be read."),
        ("host peaks", found.no_peaks, "Run where /proc/self/clear_refs can be written."),
    ]
    if found.gpu.value is not None:
        gpu = found.gpu.value
        counters += [
            ("energy", gpu["energy_j"].reason, "Energy is left out of the results."),
            (
                "clock reasons",
                gpu["events"].reason,
                "A newer driver may report them; clocks are recorded all the same.",
            ),
            ("throttled time", gpu["thermal_slowdown_s"].reason, "Samples at the ends of turns replace it."),
            ("heat margin", gpu["temperature_margin_c"].reason, "Watch the temperature with nvidia-smi."),
            (
                "neighbours",
                found.missing.get("others"),
                "Run nvidia-smi outside the container, or start it with --pid=host.",
            ),
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
    value, cpus = found.system["load"].value or 0.0, found.machine.cpus
    stalled = found.telemetry.get(telemetry_key("host", "cpu_stall_s", PHASE))
    watched = found.telemetry[telemetry_key("host", "watched_s", PHASE)]
    waits = stalled is None or stalled / watched > CONTENDED  # the load average lags a minute behind
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


def disturbances(found: Survey) -> list[DoctorCheck]:
    """Disturbances while this process computed, by the rules for trials that take turns."""
    return [
        _check("spoils", one.code, one.message, "unfit" if one.invalid else "bad", one.remedy)
        for one in judge(found.telemetry, {}, PHASE, in_turns=True)
    ]


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


def check_limits(found: Survey) -> Iterator[DoctorCheck]:
    """Too many threads, quotas, and a container."""
    quota, container, threads = found.system["quota_cpus"].value, found.system["container"].value, Workload().threads
    usable = min(found.machine.cpus, quota or found.machine.cpus)
    yield _check(
        "spoils",
        "threads",
        f"{threads} a trial, {usable:g} CPUs' worth of time",
        "unfit" if threads > usable else "good",
        "Give the container at least one whole CPU: with less, each thread is paused in every scheduling period.",
    )
    if quota is not None:
        yield _check(
            "spoils",
            "CPU quota",
            f"{quota:g} of {found.machine.cpus} CPUs: work beyond it is paused until the next scheduling period",
            "bad",
            "Use a cpuset (docker run --cpuset-cpus) instead of a quota.",
        )
    if container is not None:
        yield _check(
            "spoils",
            "container",
            f"{container}: other processes of the machine are not visible",
            "note",
            "For important results, check the load of the machine outside the container.",
        )


def gpu_settings(found: Survey) -> list[DoctorCheck]:
    """Settings, heat and faults of the GPU."""
    gpu = found.gpu.value
    if gpu is None:
        return []
    default = gpu["default_power_limit_w"].value
    broken, corrected = gpu["uncorrected_errors"].value or 0, gpu["corrected_errors"].value or 0
    counts = f"; {broken} uncorrected and {corrected} corrected errors since the driver was loaded"
    reset_advice = "Reset the GPU (nvidia-smi -r) and look at its remapped rows (nvidia-smi -q)."
    part_of_gpu = "the device is a part of a GPU: others share its power, its heat and some of its bandwidth"
    return [
        _value(
            "persistence",
            gpu["persistence"],
            lambda on: "on" if on else "off: the driver unloads between two processes",
            wrong=lambda on: not on,
            remedy="sudo nvidia-smi -pm 1",
        ),
        _value(
            "power limit",
            gpu["power_limit_w"],
            lambda watts: f"{watts:.0f} W" + ("" if default is None else f" of {default:.0f} W by default"),
            wrong=lambda watts: default is not None and watts < default,
            remedy=f"sudo nvidia-smi -pl {default or 0:.0f}, or measure everything under this limit",
        ),
        _value(
            "clock lock",
            gpu["clocks_need_root"],
            lambda need: "only root may lock the clocks" if need else "any user may",
            wrong=lambda need: need and not found.root,
            grade="note",
            remedy="Ask the administrator for nvidia-smi -lgc; otherwise the clock is recorded and not fixed.",
        ),
        _value(
            "MIG",
            gpu["sliced"],
            lambda sliced: part_of_gpu if sliced else "a whole GPU",
            wrong=bool,
            grade="note",
            remedy="Use a whole GPU for results that describe one.",
        ),
        _value(
            "heat",
            gpu["temperature_margin_c"],
            lambda degrees: f"{degrees:.0f} °C below the slow-down (less than {HOT_MARGIN_C:.0f} °C is too close)",
            wrong=lambda degrees: degrees < HOT_MARGIN_C,
            remedy="Improve its cooling, or let it cool down.",
        ),
        _value(
            "ECC",
            gpu["ecc"],
            lambda on: (
                ("on" if on else "off: a memory error would not be noticed") + (counts if broken or corrected else "")
            ),
            wrong=lambda on: bool(broken) or not on,
            grade="unfit" if broken else "note",
            remedy=reset_advice if broken else "sudo nvidia-smi -e 1",
        ),
    ]
