"""Collects facts about a machine before a measurement; `lorameter.machine.doctor` judges them.

The survey computes for a second and watches the kernel's counters, because steal and quotas have an effect only on a
busy CPU. Everything else is read once. Neither torch nor a CUDA context is loaded.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorameter.machine.gpus import Neighbours, neighbours_of
from lorameter.machine.host import MIN_ASKED_S, HostTelemetry, system_facts
from lorameter.machine.nvml import device_session
from lorameter.machine.provenance import Machine, library_version, probe_machine
from lorameter.machine.reading import Reading, missing

LOOK_S = 1.1 * MIN_ASKED_S
"""Seconds of computation: a little more than the minimum CPU time for a share."""
REQUIRED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
"""Distributions that every trial needs."""
OPTIONAL = {"flash-attn": "variants with attention = flash_attention_2", "gguf": "models in GGUF files"}
"""Distributions that only some studies need, and their purpose."""
CUDA_DRIVER = "libcuda.so.1"
"""The driver library of CUDA programs. NVML is another library of the driver, and may be present without it."""


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
    end = time.monotonic() + LOOK_S
    while time.monotonic() < end:
        pass
    host = watch.end()
    with device_session() as device:
        gpu = device.then(
            lambda one: GpuSurvey(
                facts=one.facts(),
                sample=one.sample(),
                neighbours=neighbours_of(one, generations=0),
                sliced=one.sliced,
            )
        )
    folder = next(one for one in (runs.absolute(), *runs.absolute().parents) if os.path.isdir(one))  # noqa: PTH112 no error
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
        lacks_driver=cannot_load(CUDA_DRIVER) if gpu.known else None,
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
        return missing(f"no lock can be tried in {folder}: {error.strerror}")


def cannot_load(library: str) -> str | None:
    """The loader's error; None if the library loads. No device is initialised."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return None
