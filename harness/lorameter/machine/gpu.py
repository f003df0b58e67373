"""What a GPU tells of itself, in base units; `lorameter.machine.nvml` asks it."""

from __future__ import annotations

from dataclasses import dataclass

from lorameter.machine.reading import Reading


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Device memory in bytes; `used` is what processes and the display hold, without what the driver reserves."""

    total: int
    free: int
    used: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupant:
    """A process with a compute context on the device; `bytes` is None where the driver does not say."""

    pid: int
    bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CardSample:
    """What changes from moment to moment. Cumulative counters are those since the driver was loaded."""

    energy_j: Reading[float]
    power_w: Reading[float]
    """As the driver averages it: over a second from Ampere on, GA100 excepted (documentation of NVML)."""
    sm_clock_hz: Reading[float]
    memory_clock_hz: Reading[float]
    temperature_c: Reading[float]
    temperature_margin_c: Reading[float]
    """Degrees that are left until the GPU slows down."""
    events: Reading[tuple[str, ...]]
    """Why the clocks are what they are, in the words of `lorameter.machine.throttle`."""
    thermal_slowdown_s: Reading[float]
    """Time that heat has kept the clocks down, cumulative."""
    power_slowdown_s: Reading[float]
    """Time that the power limit has kept the clocks down, cumulative."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clocks:
    """The clocks of a moment, by the same names as in `CardSample`."""

    sm_clock_hz: Reading[float]
    memory_clock_hz: Reading[float]
    events: Reading[tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What stays while nobody changes the GPU's settings."""

    name: Reading[str]
    uuid: Reading[str]
    driver: Reading[str]
    power_limit_w: Reading[float]
    """The limit in force."""
    default_power_limit_w: Reading[float]
    max_sm_clock_hz: Reading[float]
    max_memory_clock_hz: Reading[float]
    slowdown_temperature_c: Reading[float]
    ecc: Reading[bool]
    corrected_errors: Reading[int]
    """ECC errors that were put right, since the driver was loaded."""
    uncorrected_errors: Reading[int]
    mig: Reading[bool]
    persistence: Reading[bool]
    clocks_need_root: Reading[bool]
    """Whether only root may set the clocks."""
