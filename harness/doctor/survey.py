"""What can be known of a machine before anything is measured on it: gathered here, judged in `harness.doctor`.

A second of watching tells what an idle process suffers now; everything else is read once. Neither torch nor a CUDA
context is loaded for it, so the survey leaves the machine as it found it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.meters.host import HostWatch
from harness.meters.neighbours import Neighbours, neighbours_of
from harness.meters.nvml import CardFacts, Memory, Sample, card_names, open_device
from harness.meters.reading import Reading
from harness.meters.system import SystemFacts, system_facts
from harness.provenance import Machine, library_version, probe_machine

LOOK_S = 1.0
"""How long the machine is watched: a hundred ticks of the kernel's slowest counter."""
REQUIRED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
"""Distributions without which no trial starts."""
OPTIONAL = {"flash-attn": "variants with attention = flash_attention_2", "gguf": "models in GGUF files"}
"""Distributions that some studies need, and for what."""
_PEAK_RESET = Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One look at the first visible device."""

    facts: CardFacts
    sample: Sample
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
    """Counters of the kernel while this process slept (`harness.meters.host`)."""
    host_missing: Mapping[str, str]
    peaks: bool
    """Whether the kernel lets a process reset its peak of resident memory."""
    card: Reading[Card]
    cards: Reading[tuple[str, ...]]
    """Names of all cards of the machine, hidden ones too."""
    environment: Mapping[str, str]
    root: bool
    """Whether the user may change the card's settings."""


def survey(look_s: float = LOOK_S, sleep: Callable[[float], None] = time.sleep) -> Survey:
    """Look at this machine for `look_s` seconds."""
    watch = HostWatch()
    watch.begin()
    sleep(look_s)
    host = watch.end()
    return Survey(
        machine=probe_machine(),
        system=system_facts(),
        packages={name: library_version(name) for name in (*REQUIRED, *OPTIONAL)},
        host=host,
        host_missing=watch.missing,
        peaks=os.access(_PEAK_RESET, os.W_OK),
        card=_look_at_card(),
        cards=card_names(),
        environment=os.environ,
        root=os.geteuid() == 0,
    )


def _look_at_card() -> Reading[Card]:
    opened = open_device()
    device = opened.value
    if device is None:
        return Reading(reason=opened.reason)
    try:
        return Reading(
            value=Card(
                facts=device.facts(),
                sample=device.sample(),
                memory=device.memory(),
                neighbours=neighbours_of(device, generations=0),
                sliced=device.sliced,
            )
        )
    finally:
        device.close()
