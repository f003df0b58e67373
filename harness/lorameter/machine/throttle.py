"""Why a GPU's clocks are not what they could be, in words, and which of the reasons spoil a measurement.

NVML gives a mask of clocks event reasons. They are not all alike: a GPU under heavy load sits at its power limit as
its normal state, and rejecting such samples would reject every one of them. What a study cannot live with is a GPU
that protects itself from heat or from its power supply: that comes and goes, and differs between neighbouring GPUs.
"""

from __future__ import annotations

REASONS: dict[int, str] = {
    0x1: "gpu_idle",
    0x2: "applications_clocks_setting",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}
"""Bits of nvmlClocksEventReason* (nvml.h), by the names that nvidia-smi prints."""

IDLE = "gpu_idle"
"""Nothing runs: the clocks of such a moment say nothing of a step."""
POWER_CAPPED = frozenset({"sw_power_cap"})
"""The GPU does what its power limit allows; the same for every trial, as long as the limit is."""
PROTECTING = frozenset({"hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"})
"""The GPU protects itself from heat or from its supply."""


def reasons_in(mask: int) -> tuple[str, ...]:
    """The reasons in a mask, in the order of their bits; bits that this version does not know by their value."""
    known = tuple(word for bit, word in REASONS.items() if mask & bit)
    rest = mask & ~sum(REASONS)
    return (*known, *(f"bit {bit:#x}" for bit in _bits(rest)))


def _bits(mask: int) -> list[int]:
    return [1 << place for place in range(mask.bit_length()) if mask >> place & 1]
