"""The card as NVML tells it: the one binding to nvidia-ml-py in this project.

NVML asks the driver and creates no CUDA context, so the parent and a process that will fork may use it. It knows the
whole machine and not CUDA_VISIBLE_DEVICES, so the card is found by the rules of `harness.machine.visible`. Everything
is a `Reading`: cards, drivers and containers differ in what they tell, and a counter that is not there must neither end
a measurement nor count as zero.

Units are base units: NVML's milliwatts, millijoules, megahertz and nanoseconds end here.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from harness.machine.card import CardFacts, CardSample, Clocks, Memory, Occupant
from harness.machine.links import MEETINGS, NVLINK, Links, Pair
from harness.machine.reading import Reading, missing
from harness.machine.throttle import reasons_in
from harness.machine.visible import visible_devices

V = TypeVar("V")

SLICED = "the counter is the whole card's, and other MIG instances share the card"

_WORDS: dict[str, str] = {
    "NVML_ERROR_NOT_SUPPORTED": "this card or its driver does not offer it",
    "NVML_ERROR_NO_PERMISSION": "this process is not permitted to read it",
    "NVML_ERROR_FUNCTION_NOT_FOUND": "the installed driver is too old for it",
    "NVML_ERROR_LIBRARY_NOT_FOUND": "there is no libnvidia-ml.so.1: no NVIDIA driver is installed, or the container "
    "was started without it",
    "NVML_ERROR_DRIVER_NOT_LOADED": "the NVIDIA driver is installed and not loaded",
    "NVML_ERROR_GPU_IS_LOST": "the card no longer answers; it has to be reset",
    "NVML_ERROR_NOT_FOUND": "there is no such device",
    "NVML_ERROR_INVALID_ARGUMENT": "there is no such device",
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH": "the driver was updated and the machine not restarted",
}


class Device:
    """One card, or one MIG instance of a card, for as long as it is open. Made by `open_device`."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle
        card = _asked(nvml, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle, convert=lambda found: found)
        self._card = handle if card.value is None else card.value  # clocks, power and heat belong to the card
        mode = self._mig()
        self._slowdown_c = self._slowdown_temperature()  # a property of the board
        self.sliced = card.known or mode.value is True
        """Whether this is a part of a card, so that the card's power and energy are not this process's alone."""

    def close(self) -> None:
        """End the connection; other open devices keep theirs."""
        _ended(self._nvml)

    def memory(self) -> Reading[Memory]:
        """Memory of the device."""
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
        """The moment's readings; the energy is read first, as near as can be to what was timed."""
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
        """The moment's clocks and their reasons: three answers, for where there is time for no more."""
        return Clocks(
            sm_clock_hz=self._clock("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),
            memory_clock_hz=self._clock("nvmlDeviceGetClockInfo", "NVML_CLOCK_MEM"),
            events=self._events(),
        )

    def facts(self) -> CardFacts:
        """What does not change by itself."""
        return CardFacts(
            name=self._of_device("nvmlDeviceGetName", _text),
            uuid=self._of_device("nvmlDeviceGetUUID", _text),
            driver=_asked(self._nvml, "nvmlSystemGetDriverVersion", convert=_text),
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
        """From the threshold; from Ada on NVML gives the distance instead, and will drop the threshold."""
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
        return _asked(self._nvml, function, self._handle, convert=convert, constants=constants)

    def _of_card(self, function: str, convert: Callable[[Any], V], *constants: str) -> Reading[V]:
        return _asked(self._nvml, function, self._card, convert=convert, constants=constants)


def open_device(uuid: str | None = None, environment: Mapping[str, str] | None = None) -> Reading[Device]:
    """The device that CUDA would call number 0, to be closed after use; missing with the reason where there is none.

    Args:
        uuid: that of the device, where the process knows it (torch tells it once CUDA runs). It goes before the
            environment, whose numbers mean something else if CUDA sorts its devices by speed.
        environment: CUDA_VISIBLE_DEVICES; None for this process's.
    """
    nvml = _started()
    if nvml.value is None:
        return missing(nvml.reason)
    visible = visible_devices(os.environ if environment is None else environment)
    handle = _by_uuid(nvml.value, uuid) if uuid is not None else _first_visible(nvml.value, visible)
    if handle.value is None:
        _ended(nvml.value)
        return missing(handle.reason)
    return Reading(value=Device(nvml.value, handle.value))


def card_names() -> Reading[tuple[str, ...]]:
    """Names of all cards of the machine, hidden ones too, in the order in which NVML counts them."""
    nvml = _started()
    if nvml.value is None:
        return missing(nvml.reason)
    names = [
        _asked(nvml.value, "nvmlDeviceGetName", handle.value, convert=_text).value if handle.known else None
        for handle in _handles(nvml.value)
    ]
    _ended(nvml.value)
    return Reading(value=tuple(name or "a card that does not answer" for name in names))


def card_links(environment: Mapping[str, str] | None = None) -> Reading[Links]:
    """How the cards that `environment` (None: this process's) lets CUDA see reach each other. An instance of a card
    has no links."""
    nvml = _started()
    if nvml.value is None:
        return missing(nvml.reason)
    visible = visible_devices(os.environ if environment is None else environment)
    handles = _handles(nvml.value)
    numbers = range(len(handles)) if visible is None else [_number_of(nvml.value, handles, one) for one in visible]
    cards = {number: handles[number].value for number in numbers if number is not None and handles[number].known}
    pairs = tuple(
        Pair(first=one, second=other, through=_through(nvml.value, cards[one], cards[other]))
        for one, other in itertools.combinations(sorted(cards), 2)
    )
    active = tuple((number, _active_links(nvml.value, card)) for number, card in sorted(cards.items()))
    _ended(nvml.value)
    return Reading(value=Links(pairs=pairs, active=active))


def _number_of(nvml: Any, handles: list[Reading[Any]], visible: int | str) -> int | None:
    """NVML's number of an entry of CUDA_VISIBLE_DEVICES; None where it names no whole card."""
    if isinstance(visible, int):
        return visible if visible < len(handles) else None
    named = [
        number
        for number, handle in enumerate(handles)
        if (_asked(nvml, "nvmlDeviceGetUUID", handle.value, convert=_text).value or "").startswith(visible)
    ]
    return named[0] if len(named) == 1 else None


def _through(nvml: Any, one: Any, other: Any) -> Reading[str]:
    joined = _asked(nvml, "nvmlDeviceGetP2PStatus", one, other, convert=int, constants=("NVML_P2P_CAPS_INDEX_NVLINK",))
    if joined.known and joined.value == getattr(nvml, "NVML_P2P_STATUS_OK", None):
        return Reading(value=NVLINK)
    words = {getattr(nvml, name, None): said for name, said in MEETINGS.items()}
    return _asked(nvml, "nvmlDeviceGetTopologyCommonAncestor", one, other, convert=words.__getitem__)


def _active_links(nvml: Any, card: Any) -> Reading[int]:
    """Cards differ in how many they have: beyond the last one the driver refuses to answer."""
    first = _asked(nvml, "nvmlDeviceGetNvLinkState", card, 0, convert=int)
    if not first.known:
        return first
    states = (
        _asked(nvml, "nvmlDeviceGetNvLinkState", card, link, convert=int).value or 0
        for link in range(getattr(nvml, "NVML_NVLINK_MAX_LINKS", 1))
    )
    return Reading(value=sum(states))


def compute_capability(index: int) -> Reading[tuple[int, int]]:
    """Major and minor number, of the card that NVML counts as `index`."""
    nvml = _started()
    if nvml.value is None:
        return missing(nvml.reason)
    handle = _asked(nvml.value, "nvmlDeviceGetHandleByIndex", index, convert=lambda found: found)
    found: Reading[tuple[int, int]] = missing(handle.reason or "not asked")
    if handle.known:
        found = _asked(nvml.value, "nvmlDeviceGetCudaComputeCapability", handle.value, convert=_pair)
    _ended(nvml.value)
    return found


def _started() -> Reading[Any]:
    """nvidia-ml-py, ready to be asked; every start takes an end, and the last end closes the library."""
    try:
        import pynvml
    except ImportError as error:
        return missing(f"nvidia-ml-py is not installed: {error}")
    except Exception as error:  # a broken installation, or another package that calls itself pynvml
        return missing(f"nvidia-ml-py cannot be imported: {type(error).__name__}: {error}")
    begun = _asked(pynvml, "nvmlInit", convert=lambda _: True)
    return Reading(value=pynvml) if begun.known else missing(begun.reason)


def _ended(nvml: Any) -> None:
    _asked(nvml, "nvmlShutdown", convert=lambda _: True)


def _first_visible(nvml: Any, visible: tuple[int | str, ...] | None) -> Reading[Any]:
    if visible is None:
        visible = (0,)
    if not visible:
        return missing("CUDA_VISIBLE_DEVICES hides every device")
    first = visible[0]
    if isinstance(first, str):
        return _by_uuid(nvml, first)
    return _asked(nvml, "nvmlDeviceGetHandleByIndex", first, convert=lambda handle: handle)


def _by_uuid(nvml: Any, uuid: str) -> Reading[Any]:
    """By the whole of it, else by the one card whose UUID begins so."""
    whole = _asked(nvml, "nvmlDeviceGetHandleByUUID", uuid, convert=lambda handle: handle)
    if whole.known:
        return whole
    begins = [
        handle.value
        for handle in _handles(nvml)
        if handle.known
        and (_asked(nvml, "nvmlDeviceGetUUID", handle.value, convert=_text).value or "").startswith(uuid)
    ]
    if len(begins) == 1:
        return Reading(value=begins[0])
    return missing(f"{len(begins)} devices have a UUID that begins with {uuid}" if begins else whole.reason)


def _handles(nvml: Any) -> list[Reading[Any]]:
    count = _asked(nvml, "nvmlDeviceGetCount", convert=int).value or 0
    return [_asked(nvml, "nvmlDeviceGetHandleByIndex", index, convert=lambda handle: handle) for index in range(count)]


def _asked(
    nvml: Any, function: str, *arguments: Any, convert: Callable[[Any], V], constants: tuple[str, ...] = ()
) -> Reading[V]:
    """One call of NVML, whatever becomes of it; `constants` are arguments by the names that the binding gives them.

    Beside the errors of NVML the binding raises its own: of a name that is no text, a structure that the driver fills
    otherwise, a constant that came or went with a version. None of them may cost a measurement.
    """
    unknown = next((name for name in (function, *constants) if not hasattr(nvml, name)), None)
    if unknown is not None:
        return missing(f"{function}: the installed nvidia-ml-py does not know {unknown}")
    try:
        return Reading(value=convert(getattr(nvml, function)(*arguments, *(getattr(nvml, one) for one in constants))))
    except Exception as error:
        return missing(f"{function}: {_why(nvml, error)}")


def _why(nvml: Any, error: Exception) -> str:
    """In our words where NVML's code is known; an error of the binding with its type, as few say anything without."""
    if not isinstance(error, getattr(nvml, "NVMLError", ())):
        return f"{type(error).__name__}: {error}"
    code = getattr(error, "value", None)
    return next((text for name, text in _WORDS.items() if getattr(nvml, name, None) == code), str(error))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _pair(numbers: tuple[int, int]) -> tuple[int, int]:
    return int(numbers[0]), int(numbers[1])


def _thousandth(value: int) -> float:
    return value / 1e3


def _current(modes: list[int]) -> bool:
    """The mode in force; beside it NVML gives the one after the next reset."""
    return bool(modes[0])


def _memory(told: Any) -> Memory:
    return Memory(total=int(told.total), free=int(told.free), used=int(told.used))


def _occupants(processes: list[Any]) -> tuple[Occupant, ...]:
    return tuple(
        Occupant(pid=int(one.pid), bytes=None if one.usedGpuMemory is None else int(one.usedGpuMemory))
        for one in processes
    )
