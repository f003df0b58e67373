"""What can be measured of the GPU, and what of it would spoil a measurement."""

from __future__ import annotations

from collections.abc import Iterator

from lorameter.machine.disturbances import HOT_MARGIN_C, SHARED_INVALID_BYTES
from lorameter.machine.doctor.check import DoctorCheck, Grade, say
from lorameter.machine.doctor.survey import GpuSurvey
from lorameter.machine.reading import Reading
from lorameter.machine.throttle import PROTECTING
from lorameter.records.units import format_bytes


def card_meters(card: GpuSurvey) -> Iterator[DoctorCheck]:
    """Which of the GPU's counters there are."""
    asked: tuple[tuple[str, Reading[object], str], ...] = (
        ("energy", card.sample.energy_j, "Energy is left out of the results."),
        ("clock reasons", card.sample.events, "A newer driver may tell them; clocks are recorded all the same."),
        ("throttled time", card.sample.thermal_slowdown_s, "Samples at the ends of turns stand in for it."),
        ("heat margin", card.sample.temperature_margin_c, "Watch the temperature with nvidia-smi."),
        ("neighbours", card.neighbours.others, "Look from outside the container, or start it with --pid=host."),
    )
    for name, reading, remedy in asked:
        yield DoctorCheck(
            about="measures",
            name=name,
            standing="good" if reading.known else "note",
            found=say(reading, lambda _: "available"),
            remedy="" if reading.known else remedy,
        )


def card_state(card: GpuSurvey, *, root: bool) -> Iterator[DoctorCheck]:
    """Settings, heat, faults and company of the GPU; `root` says whether the user may change its settings."""
    yield from _settings(card, root=root)
    yield from _heat(card)
    yield from _faults(card)
    yield from _company(card)


def _settings(card: GpuSurvey, *, root: bool) -> Iterator[DoctorCheck]:
    facts = card.facts
    persistent, need_root = facts.persistence.value, facts.clocks_need_root.value
    yield DoctorCheck(
        about="spoils",
        name="persistence",
        standing=_standing(facts.persistence, "bad", wrong=persistent is False),
        found=say(facts.persistence, lambda on: "on" if on else "off: the driver unloads between two processes"),
        remedy="sudo nvidia-smi -pm 1" if persistent is False else "",
    )
    limit, default = facts.power_limit_w.value, facts.default_power_limit_w.value
    lowered = limit is not None and default is not None and limit < default
    of = "" if default is None else f" of {default:.0f} W by default"
    yield DoctorCheck(
        about="spoils",
        name="power limit",
        standing=_standing(facts.power_limit_w, "bad", wrong=lowered),
        found=say(facts.power_limit_w, lambda watts: f"{watts:.0f} W{of}"),
        remedy=f"sudo nvidia-smi -pl {default:.0f}, or measure everything under this limit" if lowered else "",
    )
    denied = need_root is True and not root
    yield DoctorCheck(
        about="spoils",
        name="clock lock",
        standing=_standing(facts.clocks_need_root, "note", wrong=denied),
        found=say(facts.clocks_need_root, lambda need: "only root may lock the clocks" if need else "any user may"),
        remedy="Ask whoever runs the machine for nvidia-smi -lgc; else the clock is recorded and not held."
        if denied
        else "",
    )
    if card.sliced:
        yield DoctorCheck(
            about="spoils",
            name="MIG",
            standing="note",
            found="the device is a part of a GPU: others share its power, its heat and some of its bandwidth",
            remedy="Use a whole GPU for numbers that are to stand for it.",
        )


def _heat(card: GpuSurvey) -> Iterator[DoctorCheck]:
    events, margin = card.sample.events, card.sample.temperature_margin_c
    protecting = bool(PROTECTING & set(events.value or ()))
    yield DoctorCheck(
        about="spoils",
        name="throttling",
        standing=_standing(events, "unfit", wrong=protecting),
        found=say(events, lambda words: ", ".join(words) or "none"),
        remedy="Let the GPU cool, look at its power supply, and ask again." if protecting else "",
    )
    hot = margin.value is not None and margin.value < HOT_MARGIN_C
    near = f"under {HOT_MARGIN_C:.0f} °C is too near"
    yield DoctorCheck(
        about="spoils",
        name="heat",
        standing=_standing(margin, "bad", wrong=hot),
        found=say(margin, lambda degrees: f"{degrees:.0f} °C below the slow-down ({near})"),
        remedy="Give it air, or let it cool." if hot else "",
    )


def _faults(card: GpuSurvey) -> Iterator[DoctorCheck]:
    facts = card.facts
    broken, mended = facts.uncorrected_errors.value or 0, facts.corrected_errors.value or 0
    counts = f"; {broken} uncorrected and {mended} corrected errors since the driver was loaded"
    off = facts.ecc.value is False
    yield DoctorCheck(
        about="spoils",
        name="ECC",
        standing="unfit" if broken else _standing(facts.ecc, "note", wrong=off),
        found=say(facts.ecc, lambda on: "on" if on else "off: an error in memory would go unseen")
        + (counts if broken or mended else ""),
        remedy="Reset the GPU (nvidia-smi -r) and look at its remapped rows (nvidia-smi -q)." if broken else "",
    )


def _company(card: GpuSurvey) -> Iterator[DoctorCheck]:
    """This process holds nothing on the device, so whatever is in use there is somebody else's."""
    beside, used = card.neighbours, card.neighbours.used_bytes.value
    others, held = beside.others.value, beside.others_bytes.value
    limit = f"above {format_bytes(SHARED_INVALID_BYTES)} somebody works there"
    if others:
        size = "memory of unknown size" if held is None else format_bytes(held)
        said = f"{len(others)} on the device ({', '.join(map(str, others))}) hold {size}; {limit}"
        remedy = "End them, or choose a free GPU with CUDA_VISIBLE_DEVICES."
    elif beside.statement:
        size = "an unknown amount of memory" if used is None else format_bytes(used)
        said = f"{beside.statement}; {size} in use, {limit}"
        remedy = "Look at nvidia-smi outside the container, or give it the machine's process numbers (--pid=host)."
    else:
        yield DoctorCheck(about="spoils", name="other processes", standing="good", found="none on the device")
        return
    standing: Grade = "unfit" if max(held or 0, used or 0) > SHARED_INVALID_BYTES else "bad"
    yield DoctorCheck(about="spoils", name="other processes", standing=standing, found=said, remedy=remedy)


def _standing(reading: Reading[object], when_wrong: Grade, *, wrong: bool) -> Grade:
    """What is not known is worth a note."""
    if wrong:
        return when_wrong
    return "good" if reading.known else "note"
