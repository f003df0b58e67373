"""What can be known of a machine before anything is measured on it: gathered here, judged in
`lorameter.machine.doctor`.

For a second it computes and watches what that suffers: a CPU that nobody asks for anything is not stolen from, nor does
a quota withhold it. Everything else is read once. Neither torch nor a CUDA context is loaded for it, so the survey
leaves the machine as it found it.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorameter.machine.filesystem import FolderLocation, place_of
from lorameter.machine.gpu import CardFacts, CardSample, Memory
from lorameter.machine.gpu_topology import Links
from lorameter.machine.gpus import VisibleCard, card_links, card_names, visible_cards
from lorameter.machine.host import LEAST_ASKED_S, HostTelemetry
from lorameter.machine.nvml import open_device
from lorameter.machine.other_gpu_processes import Neighbours, neighbours_of
from lorameter.machine.provenance import Machine, library_version, probe_machine
from lorameter.machine.reading import Reading
from lorameter.machine.system import SystemFacts, system_facts

LOOK_S = 1.1 * LEAST_ASKED_S
"""How long the machine is watched at work: a little more than the CPU time of which a share is given."""
REQUIRED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
"""Distributions without which no trial starts."""
OPTIONAL = {"flash-attn": "variants with attention = flash_attention_2", "gguf": "models in GGUF files"}
"""Distributions that some studies need, and for what."""
_PEAK_RESET = Path("/proc/self/clear_refs")
CUDA_DRIVER = "libcuda.so.1"
"""What CUDA programs go through. NVML is another library of the driver, and can be there without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSurvey:
    """One look at the first visible device."""

    facts: CardFacts
    sample: CardSample
    memory: Reading[Memory]
    neighbours: Neighbours
    sliced: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What was found."""

    machine: Machine
    system: SystemFacts
    packages: Mapping[str, str | None]
    """Versions of distributions; None where one is not installed."""
    host: Mapping[str, float]
    """Counters of the kernel while this process computed (`lorameter.machine.host`)."""
    host_missing: Mapping[str, str]
    peaks: bool
    """Whether the kernel lets a process reset its peak of resident memory."""
    card: Reading[GpuSurvey]
    cards: Reading[tuple[str, ...]]
    """Names of all GPUs of the machine, hidden ones too."""
    visible: Reading[tuple[VisibleCard, ...]]
    """Those that may be used."""
    links: Reading[Links]
    """How these reach each other."""
    runs: Reading[FolderLocation]
    """Where runs would be written."""
    environment: Mapping[str, str]
    root: bool
    """Whether the user may change the GPU's settings."""
    lacks_driver: str | None = None
    """Why CUDA's own driver library cannot be loaded, where NVML shows a GPU; None if it can."""


def survey(runs: Path, look_s: float = LOOK_S) -> Survey:
    """Look at this machine, and at the folder for `runs`, for `look_s` seconds, in which one of its CPUs is kept
    busy."""
    system = system_facts()  # before the work, which is part of the load after it
    watch = HostTelemetry()
    watch.begin()
    _compute(look_s)
    host = watch.end()
    card = _look_at_card()
    return Survey(
        machine=probe_machine(),
        system=system,
        packages={name: library_version(name) for name in (*REQUIRED, *OPTIONAL)},
        host=host,
        host_missing=watch.missing,
        peaks=os.access(_PEAK_RESET, os.W_OK),
        card=card,
        cards=card_names(),
        visible=visible_cards(),
        links=card_links(),
        runs=place_of(runs),
        environment=os.environ,
        root=os.geteuid() == 0,
        lacks_driver=cannot_load(CUDA_DRIVER) if card.known else None,
    )


def cannot_load(library: str) -> str | None:
    """The loader's words, None if it loads. No device is touched by that."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return None


def _compute(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def _look_at_card() -> Reading[GpuSurvey]:
    opened = open_device()
    device = opened.value
    if device is None:
        return Reading(reason=opened.reason)
    try:
        return Reading(
            value=GpuSurvey(
                facts=device.facts(),
                sample=device.sample(),
                memory=device.memory(),
                neighbours=neighbours_of(device, generations=0),
                sliced=device.sliced,
            )
        )
    finally:
        device.close()
