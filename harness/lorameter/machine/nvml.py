"""NVIDIA GPUs through NVML (nvidia-ml-py), which creates no CUDA context: the parent and a process that will fork can
use it.

Everything is a `Reading`: GPUs, drivers and containers differ in the counters that they offer, and a missing counter
must neither end a measurement nor count as zero. Units are base units: NVML's milliwatts, millijoules, megahertz and
nanoseconds are converted here.

NVML knows the whole machine and not CUDA_VISIBLE_DEVICES, whose rules are in the CUDA programming guide, appendix "CUDA
environment variables": unset, every GPU; empty, none; else a list of indices or UUIDs (or unambiguous beginnings of
UUIDs), cut at the first invalid entry. Measuring processes are started with CUDA_DEVICE_ORDER=PCI_BUS_ID
(`lorameter.run.workers.local`), so that CUDA counts along the bus, as NVML does.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lorameter.machine.reading import Reading, missing

V = TypeVar("V")

# --- which devices ----------------------------------------------------------------------------------------------------

VARIABLE = "CUDA_VISIBLE_DEVICES"
ORDER_VARIABLE = "CUDA_DEVICE_ORDER"
BUS_ORDER = "PCI_BUS_ID"
_INDEX = re.compile(r"[0-9]{1,9}")
_UUID = re.compile(r"(GPU|MIG)-[0-9A-Za-z]")


def visible_devices(environment: Mapping[str, str]) -> tuple[int | str, ...] | None:
    """The entries that CUDA would accept, in its order: an index along the bus, or (the beginning of) a UUID.

    None if the variable is not set, which hides nothing; an empty tuple if it hides every GPU.
    """
    listed = environment.get(VARIABLE)
    if listed is None:
        return None
    entries: list[int | str] = []
    for entry in (part.strip() for part in listed.split(",")):
        if _INDEX.fullmatch(entry):
            entries.append(int(entry))
        elif _UUID.match(entry):
            entries.append(entry)
        else:  # "-1", for example: it hides itself and all that follow
            break
    return tuple(entries) if len(set(entries)) == len(entries) else ()  # an entry given twice makes the list invalid


# --- calls ------------------------------------------------------------------------------------------------------------

_WORDS: dict[str, str] = {
    "NVML_ERROR_NOT_SUPPORTED": "this GPU or its driver does not offer it",
    "NVML_ERROR_NO_PERMISSION": "this process is not permitted to read it",
    "NVML_ERROR_FUNCTION_NOT_FOUND": "the installed driver is too old for it",
    "NVML_ERROR_LIBRARY_NOT_FOUND": "there is no libnvidia-ml.so.1: no NVIDIA driver is installed, or the container "
    "was started without it",
    "NVML_ERROR_DRIVER_NOT_LOADED": "the NVIDIA driver is installed and not loaded",
    "NVML_ERROR_GPU_IS_LOST": "the GPU no longer answers; it has to be reset",
    "NVML_ERROR_NOT_FOUND": "there is no such device",
    "NVML_ERROR_INVALID_ARGUMENT": "there is no such device",
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH": "the driver was updated and the machine not restarted",
}


@contextlib.contextmanager
def nvml_session() -> Iterator[Reading[Any]]:
    """nvidia-ml-py, initialised; missing with the reason if it is not installed or finds no driver. NVML counts its
    initialisations: sessions can overlap."""
    nvml = initialise()
    try:
        yield nvml
    finally:
        if nvml.value is not None:
            shut_down(nvml.value)


def initialise() -> Reading[Any]:
    """Opens NVML for a caller that ends with `shut_down`."""
    try:
        import pynvml
    except Exception as error:  # not installed, a broken installation, or another package of this name
        return missing(f"nvidia-ml-py cannot be imported: {type(error).__name__}: {error}")
    return ask(pynvml, "nvmlInit", convert=lambda _: pynvml)


def shut_down(nvml: Any) -> None:
    """Ends what `initialise` began."""
    ask(nvml, "nvmlShutdown", convert=lambda _: True)


def by_uuid(nvml: Any, uuid: str) -> Reading[Any]:
    """The device with this UUID, or the only one whose UUID begins with it."""
    whole = ask(nvml, "nvmlDeviceGetHandleByUUID", uuid, convert=lambda handle: handle)
    if whole.known:
        return whole
    begins = [
        handle.value
        for handle in handles_of(nvml)
        if handle.known and (ask(nvml, "nvmlDeviceGetUUID", handle.value, convert=text_of).value or "").startswith(uuid)
    ]
    if len(begins) == 1:
        return Reading(value=begins[0])
    return missing(f"{len(begins)} devices have a UUID that begins with {uuid}" if begins else whole.reason)


def handle_of(nvml: Any, entry: int | str) -> Reading[Any]:
    """The device of an entry of CUDA_VISIBLE_DEVICES: a number along the bus, or a UUID."""
    if isinstance(entry, str):
        return by_uuid(nvml, entry)
    return ask(nvml, "nvmlDeviceGetHandleByIndex", entry, convert=lambda handle: handle)


def handles_of(nvml: Any) -> list[Reading[Any]]:
    """All GPUs, in the order of NVML."""
    count = ask(nvml, "nvmlDeviceGetCount", convert=int).value or 0
    return [handle_of(nvml, index) for index in range(count)]


def card_of(nvml: Any, handle: Any) -> Reading[Any]:
    """The GPU of a MIG instance; missing for a whole GPU."""
    return ask(nvml, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle, convert=lambda found: found)


def ask(
    nvml: Any, function: str, *arguments: Any, convert: Callable[[Any], V], constants: tuple[str, ...] = ()
) -> Reading[V]:
    """One call of NVML; an error makes the value missing. `constants` are arguments by their names in the binding.

    Besides NVML's errors the binding raises its own: for a name that is not UTF-8, an unexpected structure, a constant
    that a version added or removed.
    """
    unknown = next((name for name in (function, *constants) if not hasattr(nvml, name)), None)
    if unknown is not None:
        return missing(f"{function}: the installed nvidia-ml-py does not know {unknown}")
    try:
        return Reading(value=convert(getattr(nvml, function)(*arguments, *(getattr(nvml, one) for one in constants))))
    except Exception as error:
        return missing(f"{function}: {_why(nvml, error)}")


def _why(nvml: Any, error: Exception) -> str:
    """Words for common codes of NVML, otherwise the text of the error; with its type for errors of the binding."""
    if not isinstance(error, getattr(nvml, "NVMLError", ())):
        return f"{type(error).__name__}: {error}"
    code = getattr(error, "value", None)
    return next((text for name, text in _WORDS.items() if getattr(nvml, name, None) == code), str(error))


def text_of(value: str | bytes) -> str:
    """A text, which some versions of the binding return as bytes."""
    return value.decode() if isinstance(value, bytes) else value


# --- clocks -----------------------------------------------------------------------------------------------------------

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
"""Nothing runs: the clocks of such a moment are not those of a step."""
POWER_CAPPED = frozenset({"sw_power_cap"})
"""The normal state of a GPU under heavy load, and the same for every trial: no reason to reject one."""
PROTECTING = frozenset({"hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"})
"""The GPU protects itself from heat or from its power supply: that comes and goes, and differs between GPUs."""


def reasons_in(mask: int) -> tuple[str, ...]:
    """The reasons in a mask, in the order of their bits."""
    return tuple(name for bit, name in REASONS.items() if mask & bit)


# --- readings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Device memory in bytes; `used` is that of processes and the display, without what the driver reserves."""

    total: int
    free: int
    used: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupant:
    """A process with a compute context on the device; `bytes` is None if the driver does not report it."""

    pid: int
    bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CardSample:
    """Momentary readings, and counters since the driver was loaded."""

    energy_j: Reading[float]
    power_w: Reading[float]
    """As the driver averages it: over a second from Ampere on, GA100 excepted (documentation of NVML)."""
    sm_clock_hz: Reading[float]
    memory_clock_hz: Reading[float]
    temperature_c: Reading[float]
    temperature_margin_c: Reading[float]
    """Degrees below the slow-down temperature."""
    events: Reading[tuple[str, ...]]
    """Reasons for the present clocks, as in `REASONS`."""
    thermal_slowdown_s: Reading[float]
    """Time in which heat lowered the clocks, cumulative."""
    power_slowdown_s: Reading[float]
    """Time in which the power limit lowered the clocks, cumulative."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clocks:
    """Momentary clocks, by the names of `CardSample`."""

    sm_clock_hz: Reading[float]
    memory_clock_hz: Reading[float]
    events: Reading[tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """Properties and settings of the GPU."""

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
    """ECC errors since the driver was loaded."""
    uncorrected_errors: Reading[int]
    mig: Reading[bool]
    persistence: Reading[bool]
    clocks_need_root: Reading[bool]
    """Whether only root may set the clocks."""


SLICED = "the counter is the whole GPU's, and other MIG instances share the GPU"


class NvmlDevice:
    """An open GPU, or MIG instance of a GPU. Made by `open_device`."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle
        card = card_of(nvml, handle)
        self._card = handle if card.value is None else card.value  # clocks, power and heat belong to the GPU
        mode = self._mig()
        self._slowdown_c = self._slowdown_temperature()  # a property of the board
        self.sliced = card.known or mode.value is True
        """Whether this is a part of a GPU, so that the GPU's power and energy are shared."""

    def close(self) -> None:
        """Closes the device; other open devices are not affected."""
        shut_down(self._nvml)

    def memory(self) -> Reading[Memory]:
        """Memory in bytes."""
        newer = self._of_device("nvmlDeviceGetMemoryInfo", _memory, "nvmlMemory_v2")
        return newer if newer.known else self._of_device("nvmlDeviceGetMemoryInfo", _memory)

    def occupants(self) -> Reading[tuple[Occupant, ...]]:
        """Processes with a compute context on the device, as far as this process may see them."""
        return self._of_device("nvmlDeviceGetComputeRunningProcesses", _occupants)

    def energy_j(self) -> Reading[float]:
        """The energy counter: joules since the driver was loaded."""
        if self.sliced:
            return missing(SLICED)
        return self._of_card("nvmlDeviceGetTotalEnergyConsumption", _thousandth)

    def sample(self) -> CardSample:
        """Present readings; energy is read first, closest to the end of what was timed."""
        energy = self.energy_j()
        temperature = self._temperature()
        return CardSample(
            energy_j=energy,
            power_w=missing(SLICED) if self.sliced else self._of_card("nvmlDeviceGetPowerUsage", _thousandth),
            sm_clock_hz=self._clock("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),
            memory_clock_hz=self._clock("nvmlDeviceGetClockInfo", "NVML_CLOCK_MEM"),
            temperature_c=temperature,
            temperature_margin_c=self._margin(temperature),
            events=self._events(),
            thermal_slowdown_s=self._slowed("NVML_PERF_POLICY_THERMAL"),
            power_slowdown_s=self._slowed("NVML_PERF_POLICY_POWER"),
        )

    def clocks(self) -> Clocks:
        """Present clocks and their reasons: three calls, for use while work is queued."""
        return Clocks(
            sm_clock_hz=self._clock("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),
            memory_clock_hz=self._clock("nvmlDeviceGetClockInfo", "NVML_CLOCK_MEM"),
            events=self._events(),
        )

    def facts(self) -> CardFacts:
        """Properties and settings."""
        return CardFacts(
            name=self._of_device("nvmlDeviceGetName", text_of),
            uuid=self._of_device("nvmlDeviceGetUUID", text_of),
            driver=ask(self._nvml, "nvmlSystemGetDriverVersion", convert=text_of),
            power_limit_w=self._of_card("nvmlDeviceGetEnforcedPowerLimit", _thousandth),
            default_power_limit_w=self._of_card("nvmlDeviceGetPowerManagementDefaultLimit", _thousandth),
            max_sm_clock_hz=self._clock("nvmlDeviceGetMaxClockInfo", "NVML_CLOCK_SM"),
            max_memory_clock_hz=self._clock("nvmlDeviceGetMaxClockInfo", "NVML_CLOCK_MEM"),
            slowdown_temperature_c=self._slowdown_c,
            ecc=self._of_card("nvmlDeviceGetEccMode", _current),
            corrected_errors=self._ecc_errors("NVML_MEMORY_ERROR_TYPE_CORRECTED"),
            uncorrected_errors=self._ecc_errors("NVML_MEMORY_ERROR_TYPE_UNCORRECTED"),
            mig=self._mig(),
            persistence=self._of_card("nvmlDeviceGetPersistenceMode", bool),
            clocks_need_root=self._of_card(
                "nvmlDeviceGetAPIRestriction", bool, "NVML_RESTRICTED_API_SET_APPLICATION_CLOCKS"
            ),
        )

    def _events(self) -> Reading[tuple[str, ...]]:
        newer = self._of_card("nvmlDeviceGetCurrentClocksEventReasons", reasons_in)
        return newer if newer.known else self._of_card("nvmlDeviceGetCurrentClocksThrottleReasons", reasons_in)

    def _temperature(self) -> Reading[float]:
        return self._of_card("nvmlDeviceGetTemperature", float, "NVML_TEMPERATURE_GPU")

    def _slowdown_temperature(self) -> Reading[float]:
        return self._of_card("nvmlDeviceGetTemperatureThreshold", float, "NVML_TEMPERATURE_THRESHOLD_SLOWDOWN")

    def _margin(self, temperature: Reading[float]) -> Reading[float]:
        """From the threshold; from Ada on NVML reports the distance instead."""
        threshold = self._slowdown_c
        if threshold.value is not None and temperature.value is not None:
            return Reading(value=threshold.value - temperature.value)
        return self._of_card("nvmlDeviceGetMarginTemperature", float)

    def _clock(self, function: str, clock: str) -> Reading[float]:
        return self._of_card(function, lambda megahertz: megahertz * 1e6, clock)

    def _slowed(self, policy: str) -> Reading[float]:
        return self._of_card("nvmlDeviceGetViolationStatus", lambda status: status.violationTime / 1e9, policy)

    def _ecc_errors(self, kind: str) -> Reading[int]:
        return self._of_card("nvmlDeviceGetTotalEccErrors", int, kind, "NVML_VOLATILE_ECC")

    def _mig(self) -> Reading[bool]:
        return self._of_card("nvmlDeviceGetMigMode", _current)

    def _of_device(self, function: str, convert: Callable[[Any], V], *constants: str) -> Reading[V]:
        return ask(self._nvml, function, self._handle, convert=convert, constants=constants)

    def _of_card(self, function: str, convert: Callable[[Any], V], *constants: str) -> Reading[V]:
        return ask(self._nvml, function, self._card, convert=convert, constants=constants)


def open_device(uuid: str | None = None, environment: Mapping[str, str] | None = None) -> Reading[NvmlDevice]:
    """The device that CUDA numbers 0, to be closed after use; missing with the reason if there is none.

    Args:
        uuid: of the device, if the process knows it (from torch, once CUDA is initialised). It takes precedence over
            the environment, whose numbers have another meaning if CUDA sorts its devices by speed.
        environment: CUDA_VISIBLE_DEVICES; None for this process's.
    """
    nvml = initialise()
    if nvml.value is None:
        return missing(nvml.reason)
    visible = visible_devices(os.environ if environment is None else environment)
    handle = by_uuid(nvml.value, uuid) if uuid is not None else _first_visible(nvml.value, visible)
    if handle.value is None:
        shut_down(nvml.value)
        return missing(handle.reason)
    return Reading(value=NvmlDevice(nvml.value, handle.value))


def _first_visible(nvml: Any, visible: tuple[int | str, ...] | None) -> Reading[Any]:
    if visible is None:
        visible = (0,)
    return handle_of(nvml, visible[0]) if visible else missing("CUDA_VISIBLE_DEVICES hides every device")


def compute_capability(index: int) -> Reading[tuple[int, int]]:
    """Major and minor number of the GPU with this number in NVML."""
    with nvml_session() as nvml:
        if nvml.value is None:
            return missing(nvml.reason)
        handle = handle_of(nvml.value, index)
        if handle.value is None:
            return missing(handle.reason)
        return ask(nvml.value, "nvmlDeviceGetCudaComputeCapability", handle.value, convert=_pair)


def _pair(numbers: tuple[int, int]) -> tuple[int, int]:
    return int(numbers[0]), int(numbers[1])


def _thousandth(value: int) -> float:
    return value / 1e3


def _current(modes: list[int]) -> bool:
    """The mode in force; the second entry is the mode after the next reset."""
    return bool(modes[0])


def _memory(info: Any) -> Memory:
    return Memory(total=int(info.total), free=int(info.free), used=int(info.used))


def _occupants(processes: list[Any]) -> tuple[Occupant, ...]:
    return tuple(
        Occupant(pid=int(one.pid), bytes=None if one.usedGpuMemory is None else int(one.usedGpuMemory))
        for one in processes
    )
