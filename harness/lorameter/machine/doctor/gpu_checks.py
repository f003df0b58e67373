"""Checks of the GPU: what can be measured of it, and what would disturb a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lorameter.machine.disturbances import HOT_MARGIN_C, SHARED_INVALID_BYTES
from lorameter.machine.doctor.checks import DoctorCheck, Grade, in_words, setting
from lorameter.machine.doctor.survey import GpuSurvey, Survey
from lorameter.machine.gpus import say_entries, shared_boards
from lorameter.machine.nvml import PROTECTING
from lorameter.machine.reading import Reading
from lorameter.records.units import format_bytes

MPS_PIPES, MPS_DEFAULT = "CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"
"""Where the control daemon of NVIDIA's Multi-Process Service listens (docs.nvidia.com, MPS, environment variables)."""


def card_meters(card: GpuSurvey) -> Iterator[DoctorCheck]:
    """Counters that the GPU offers."""
    meters: tuple[tuple[str, Reading[object], str], ...] = (
        ("energy", card.sample.energy_j, "Energy is left out of the results."),
        ("clock reasons", card.sample.events, "A newer driver may report them; clocks are recorded all the same."),
        ("throttled time", card.sample.thermal_slowdown_s, "Samples at the ends of turns replace it."),
        ("heat margin", card.sample.temperature_margin_c, "Watch the temperature with nvidia-smi."),
        ("neighbours", card.neighbours.others, "Look from outside the container, or start it with --pid=host."),
    )
    for name, reading, remedy in meters:
        yield DoctorCheck(
            about="measures",
            name=name,
            grade="good" if reading.known else "note",
            found=in_words(reading, lambda _: "available"),
            remedy="" if reading.known else remedy,
        )


def card_state(card: GpuSurvey, *, root: bool) -> Iterator[DoctorCheck]:
    """Settings, heat, faults and other processes of the GPU; `root`: whether the user may change its settings."""
    facts, sample = card.facts, card.sample
    yield setting(
        "persistence",
        facts.persistence,
        lambda on: "on" if on else "off: the driver unloads between two processes",
        wrong=facts.persistence.value is False,
        grade="bad",
        remedy="sudo nvidia-smi -pm 1",
    )
    limit, default = facts.power_limit_w.value, facts.default_power_limit_w.value
    yield setting(
        "power limit",
        facts.power_limit_w,
        lambda watts: f"{watts:.0f} W" + ("" if default is None else f" of {default:.0f} W by default"),
        wrong=limit is not None and default is not None and limit < default,
        grade="bad",
        remedy=f"sudo nvidia-smi -pl {default or 0:.0f}, or measure everything under this limit",
    )
    yield setting(
        "clock lock",
        facts.clocks_need_root,
        lambda need: "only root may lock the clocks" if need else "any user may",
        wrong=facts.clocks_need_root.value is True and not root,
        grade="note",
        remedy="Ask the administrator for nvidia-smi -lgc; otherwise the clock is recorded and not fixed.",
    )
    if card.sliced:
        yield DoctorCheck(
            about="spoils",
            name="MIG",
            grade="note",
            found="the device is a part of a GPU: others share its power, its heat and some of its bandwidth",
            remedy="Use a whole GPU for numbers that are to hold for it.",
        )
    yield setting(
        "throttling",
        sample.events,
        lambda reasons: ", ".join(reasons) or "none",
        wrong=bool(PROTECTING & set(sample.events.value or ())),
        grade="unfit",
        remedy="Let the GPU cool, look at its power supply, and ask again.",
    )
    margin = sample.temperature_margin_c
    yield setting(
        "heat",
        margin,
        lambda degrees: f"{degrees:.0f} °C below the slow-down (under {HOT_MARGIN_C:.0f} °C is too near)",
        wrong=margin.value is not None and margin.value < HOT_MARGIN_C,
        grade="bad",
        remedy="Give it air, or let it cool.",
    )
    broken, corrected = facts.uncorrected_errors.value or 0, facts.corrected_errors.value or 0
    counts = f"; {broken} uncorrected and {corrected} corrected errors since the driver was loaded"
    yield setting(
        "ECC",
        facts.ecc,
        lambda on: (
            ("on" if on else "off: an error in memory would go unseen") + (counts if broken or corrected else "")
        ),
        wrong=bool(broken) or facts.ecc.value is False,
        grade="unfit" if broken else "note",
        remedy="Reset the GPU (nvidia-smi -r) and look at its remapped rows (nvidia-smi -q)."
        if broken
        else "sudo nvidia-smi -e 1",
    )
    yield _other_processes(card)


def _other_processes(card: GpuSurvey) -> DoctorCheck:
    """This process holds nothing on the device, so all that is in use belongs to others."""
    neighbours, used = card.neighbours, card.neighbours.used_bytes.value
    others, held = neighbours.others.value, neighbours.others_bytes.value
    limit = f"above {format_bytes(SHARED_INVALID_BYTES)} they are at work"
    if others:
        size = "memory of unknown size" if held is None else format_bytes(held)
        said = f"{len(others)} on the device ({', '.join(map(str, others))}) hold {size}; {limit}"
        remedy = "End them, or choose a free GPU with CUDA_VISIBLE_DEVICES."
    elif neighbours.statement:
        size = "an unknown amount of memory" if used is None else format_bytes(used)
        said = f"{neighbours.statement}; {size} in use, {limit}"
        remedy = "Look at nvidia-smi outside the container, or give it the machine's process numbers (--pid=host)."
    else:
        return DoctorCheck(about="spoils", name="other processes", grade="good", found="none on the device")
    grade: Grade = "unfit" if max(held or 0, used or 0) > SHARED_INVALID_BYTES else "bad"
    return DoctorCheck(about="spoils", name="other processes", grade=grade, found=said, remedy=remedy)


def shared_cards(found: Survey) -> Iterator[DoctorCheck]:
    """Ranks on parts of one GPU, and NVIDIA's Multi-Process Service, by which processes share a context."""
    shared = [say_entries(parts) for parts in shared_boards(found.visible.value or ())]
    if shared:
        yield DoctorCheck(
            about="spoils",
            name="ranks",
            grade="note",
            found=f"{'; '.join(shared)} are parts of one GPU: ranks, or sites, on them would disturb each other",
            remedy="Make one instance of each GPU visible (CUDA_VISIBLE_DEVICES).",
        )
    pipes = Path(found.environment.get(MPS_PIPES) or MPS_DEFAULT)
    if found.card.known and (pipes / "control").exists():
        yield DoctorCheck(
            about="spoils",
            name="MPS",
            grade="bad",
            found=f"its control daemon listens in {pipes}: processes share a context, and a fault of one ends all",
            remedy="echo quit | nvidia-cuda-mps-control, or set CUDA_MPS_PIPE_DIRECTORY to an empty folder.",
        )
