"""Energy from the card's own counter: a difference of two readings, no sampling thread beside what is timed.

The counter moves in steps whose period NVML does not document, and on A100 and H100 the power sensor looks at a quarter
of the time only (Yang, Adamek & Armour, "Part-time Power Measurements", 2023, arXiv 2312.02741). A difference over a
short stretch is therefore mostly the phase of those clocks, and none is given. On a Grace Hopper the counter is that of
the whole module, its CPU included.
"""

from __future__ import annotations

from harness.machine.reading import Reading, missing

COUNTER_PERIOD_S = 0.1
"""Longest time between two updates of the counter that is allowed for: an assumption, on the safe side of the 10 ms
that users report."""
LEAST_S = 2.0
"""Shortest stretch whose energy is given: each end is uncertain by up to half a period, so 5 % of it at most."""


def energy_between(first: Reading[float], last: Reading[float], seconds: float) -> Reading[float]:
    """Joules between two readings of the counter that are `seconds` apart.

    Missing where a reading is, where the stretch is shorter than `LEAST_S`, and where the counter went back: it counts
    in 64 bits since the driver was loaded, so it was reset in between, and what it had counted until then is lost.
    """
    if first.value is None or last.value is None:
        return missing(first.reason or last.reason)
    if last.value < first.value:
        return missing(
            f"the energy counter went back from {first.value:.3f} to {last.value:.3f} J: the driver was reloaded"
        )
    if seconds < LEAST_S:
        return missing(
            f"{seconds:.2f} s were measured, and the energy counter may move every {COUNTER_PERIOD_S:g} s only: under "
            f"{LEAST_S:g} s its difference says little"
        )
    if last.value == first.value:
        return missing(f"the energy counter stood still at {first.value:.3f} J for {seconds:.2f} s")
    return Reading(value=last.value - first.value)
