"""What of several steps goes through a trainer's log, by names that no other metric has."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from lorameter.attach.observer import StepReading

PREFIX = "lorameter/"
TIMES = ("step_time_s", "data_time_s", "forward_time_s", "backward_time_s", "optimizer_time_s")


def summarise(readings: Sequence[StepReading], beside: Mapping[str, float]) -> dict[str, float]:
    """Medians of the times of these steps, their tokens, and tokens a second; what was not seen in all of them is left
    out. What the follower knows `beside` goes along.

    Steps that a check looked on at are left out: their times are the check's.
    """
    plain = [reading for reading in readings if reading.checks is None]
    found: dict[str, float] = {}
    for name in TIMES:
        times = [getattr(reading, name) for reading in plain]
        if times and None not in times:
            found[f"{PREFIX}{name}"] = statistics.median(times)
    seconds = sum(reading.step_time_s for reading in plain)
    for kind in ("real", "padded"):
        counts = [getattr(reading, f"{kind}_tokens") for reading in plain]
        if seconds and counts and None not in counts:
            found[f"{PREFIX}{kind}_tokens"] = sum(counts)
            found[f"{PREFIX}{kind}_tokens_per_s"] = sum(counts) / seconds
    return found | {f"{PREFIX}{name}": value for name, value in beside.items()}
