"""The GPU as NVML tells it (`lorameter.machine.nvml_calls`).

NVML knows the whole machine and not CUDA_VISIBLE_DEVICES, so the GPU is found by the rules of
`lorameter.machine.visible_gpus`; of several `lorameter.machine.gpus` tells.

Units are base units: NVML's milliwatts, millijoules, megahertz and nanoseconds end here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lorameter.machine.gpu import CardFacts, CardSample, Clocks, Memory, Occupant
from lorameter.machine.nvml_calls import asked, by_uuid, card_of, ended, handle_of, started, text_of
from lorameter.machine.reading import Reading, missing
from lorameter.machine.throttle import reasons_in
from lorameter.machine.visible_gpus import visible_devices

V = TypeVar("V")

SLICED = "the counter is the whole GPU's, and other MIG instances share the GPU"


class NvmlDevice:
    """One GPU, or one MIG instance of a GPU, for as long as it is open. Made by `open_device`."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle
        card = card_of(nvml, handle)
        self._card = handle if card.value is None else card.value  # clocks, power and heat belong to the GPU
        mode = self._mig()
        self._slowdown_c = self._slowdown_temperature()  # a property of the board
        self.sliced = card.known or mode.value is True
        """Whether this is a part of a GPU, so that the GPU's power and energy are not this process's alone."""

    def close(self) -> None:
        """End the connection; other open devices keep theirs."""
        ended(self._nvml)

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
            name=self._of_device("nvmlDeviceGetName", text_of),
            uuid=self._of_device("nvmlDeviceGetUUID", text_of),
            driver=asked(self._nvml, "nvmlSystemGetDriverVersion", convert=text_of),
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
        return asked(self._nvml, function, self._handle, convert=convert, constants=constants)

    def _of_card(self, function: str, convert: Callable[[Any], V], *constants: str) -> Reading[V]:
        return asked(self._nvml, function, self._card, convert=convert, constants=constants)


def open_device(uuid: str | None = None, environment: Mapping[str, str] | None = None) -> Reading[NvmlDevice]:
    """The device that CUDA would call number 0, to be closed after use; missing with the reason where there is none.

    Args:
        uuid: that of the device, where the process knows it (torch tells it once CUDA runs). It goes before the
            environment, whose numbers mean something else if CUDA sorts its devices by speed.
        environment: CUDA_VISIBLE_DEVICES; None for this process's.
    """
    nvml = started()
    if nvml.value is None:
        return missing(nvml.reason)
    visible = visible_devices(os.environ if environment is None else environment)
    handle = by_uuid(nvml.value, uuid) if uuid is not None else _first_visible(nvml.value, visible)
    if handle.value is None:
        ended(nvml.value)
        return missing(handle.reason)
    return Reading(value=NvmlDevice(nvml.value, handle.value))


def _first_visible(nvml: Any, visible: tuple[int | str, ...] | None) -> Reading[Any]:
    if visible is None:
        visible = (0,)
    return handle_of(nvml, visible[0]) if visible else missing("CUDA_VISIBLE_DEVICES hides every device")


def compute_capability(index: int) -> Reading[tuple[int, int]]:
    """Major and minor number, of the GPU that NVML counts as `index`."""
    nvml = started()
    if nvml.value is None:
        return missing(nvml.reason)
    handle = handle_of(nvml.value, index)
    found: Reading[tuple[int, int]] = missing(handle.reason or "not asked")
    if handle.known:
        found = asked(nvml.value, "nvmlDeviceGetCudaComputeCapability", handle.value, convert=_pair)
    ended(nvml.value)
    return found


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
