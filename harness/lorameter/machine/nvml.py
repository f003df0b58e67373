"""Reads NVIDIA GPUs through NVML (nvidia-ml-py): which ones a process may use, their counters and settings, and which
other processes use them. NVML creates no CUDA context, so the parent and a process that will fork can use it.

All values are a `Reading`: GPUs, drivers and containers differ in the counters that they provide, and a missing counter
must neither end a measurement nor count as zero. Units are base units: NVML's milliwatts, millijoules, megahertz and
nanoseconds are converted here.

NVML shows the whole machine and ignores CUDA_VISIBLE_DEVICES, whose rules are in the CUDA programming guide, appendix
"CUDA environment variables": unset means every GPU; empty means none; else it is a list of indices or UUIDs (or
unambiguous UUID prefixes), truncated at the first invalid entry. Measuring processes are started with
CUDA_DEVICE_ORDER=PCI_BUS_ID (`lorameter.run.workers.local`), so that CUDA numbers GPUs by bus, as NVML does.

NVML lists processes by the PIDs of the host. In a container with a PID namespace, an older driver lists PIDs that are
meaningless there, or none, so an empty list does not mean an idle GPU. Memory still reveals a hidden process: the bytes
in use exceed the sum of the listed processes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorameter.errors import format_error
from lorameter.machine.reading import Reading, missing_reading

# --- which devices ----------------------------------------------------------------------------------------------------

VARIABLE = "CUDA_VISIBLE_DEVICES"
_INDEX = re.compile(r"[0-9]{1,9}")
_UUID = re.compile(r"(GPU|MIG)-[0-9A-Za-z]")


def visible_devices(environment: Mapping[str, str]) -> tuple[int | str, ...] | None:
    """The entries that CUDA would accept, in its order: a bus index, or a UUID (prefix).

    None if the variable is not set; an empty tuple if it hides every GPU.
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
        else:  # "-1", for example, hides itself and all later entries
            break
    return tuple(entries) if len(set(entries)) == len(entries) else ()  # a repeated entry makes the list invalid


# --- calls ------------------------------------------------------------------------------------------------------------


def _identity(value: Any) -> Any:
    return value


@contextlib.contextmanager
def nvml_session() -> Iterator[Reading[Any]]:
    """nvidia-ml-py, initialised; missing with the reason if it is not installed or finds no driver. NVML counts its
    initialisations, so sessions can overlap."""
    nvml = _initialise()
    try:
        yield nvml
    finally:
        if nvml.value is not None:
            call_nvml(nvml.value, "nvmlShutdown")


def _initialise() -> Reading[Any]:
    try:
        import pynvml
    except Exception as error:  # not installed, a broken installation, or another package with this name
        return missing_reading(f"nvidia-ml-py cannot be imported: {format_error(error)}")
    return call_nvml(pynvml, "nvmlInit").then(lambda _: pynvml)


def call_nvml(nvml: Any, function: str, *arguments: Any, convert: Callable[[Any], Any] = _identity) -> Reading[Any]:
    """Call an NVML function; returns True if it returns nothing, and a missing value for an error. Text arguments with
    the prefix NVML_ are constants of the binding.

    Besides NVML's errors the binding raises its own: for a name that is not UTF-8, an unexpected structure, a function
    or a constant that a version added or removed.
    """
    try:
        values = [getattr(nvml, one) if str(one).startswith("NVML_") else one for one in arguments]
        found = getattr(nvml, function)(*values)
        return Reading(value=convert(True if found is None else found))
    except Exception as error:
        return missing_reading(f"{function}: {format_error(error)}")


def find_by_uuid(nvml: Any, uuid: str) -> Reading[Any]:
    """The device with this UUID, or the only device with this UUID prefix."""
    whole = call_nvml(nvml, "nvmlDeviceGetHandleByUUID", uuid)
    if whole.known:
        return whole
    handles = [get_handle(nvml, index).value for index in range(call_nvml(nvml, "nvmlDeviceGetCount").value or 0)]
    begins = [one for one in handles if (read_uuid(nvml, one).value or "").startswith(uuid)]
    if len(begins) == 1:
        return Reading(value=begins[0])
    return missing_reading(f"{len(begins)} devices have a UUID that begins with {uuid}" if begins else whole.reason)


def read_uuid(nvml: Any, handle: Any) -> Reading[str]:
    """The UUID of a device."""
    return call_nvml(nvml, "nvmlDeviceGetUUID", handle)


def get_handle(nvml: Any, entry: int | str) -> Reading[Any]:
    """The device of an entry of CUDA_VISIBLE_DEVICES: a bus index, or a UUID."""
    return find_by_uuid(nvml, entry) if isinstance(entry, str) else call_nvml(nvml, "nvmlDeviceGetHandleByIndex", entry)


def read_board(nvml: Any, handle: Any) -> Reading[Any]:
    """The GPU of a MIG instance; missing for a whole GPU."""
    return call_nvml(nvml, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle)


# --- clocks -----------------------------------------------------------------------------------------------------------
# Bits of nvmlClocksEventReason* (nvml.h).

IDLE = 0x1
"""The GPU is idle, so the clocks are not those of a step."""
POWER_CAPPED = 0x4
"""The power limit sets the clock: the normal state of a GPU under heavy load, and the same for every trial, so no trial
is rejected for it."""
PROTECTING = 0x8 | 0x20 | 0x40 | 0x80
"""The GPU slows down to protect itself against heat or power-supply problems, which vary over time and between GPUs:
hardware slow-down, software and hardware thermal slow-down, power brake."""


# --- readings ---------------------------------------------------------------------------------------------------------

SLICED = "the counter is the whole GPU's, and other MIG instances share the GPU"


class NvmlDevice:
    """An open GPU, or MIG instance of a GPU; created by `open_device` and `device_session`."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle
        board = read_board(nvml, handle)
        self._board = handle if board.value is None else board.value  # clocks, power and heat are the whole GPU's
        self._mig = self._of_board("nvmlDeviceGetMigMode", convert=_current_mode)
        self._slowdown_c = self._of_board(
            "nvmlDeviceGetTemperatureThreshold", "NVML_TEMPERATURE_THRESHOLD_SLOWDOWN", convert=float
        )
        self.sliced = board.known or self._mig.value is True
        """Whether this is a part of a GPU, so that power and energy are shared."""

    def memory(self) -> Reading[Any]:
        """Bytes `total`, `free` and `used`, which is the memory of processes and the display, without the driver's
        reserve."""
        return self._of_device("nvmlDeviceGetMemoryInfo", self._nvml.nvmlMemory_v2)

    def occupants(self) -> Reading[list[Any]]:
        """Processes with a compute context on the device, as far as this process may see them: their `pid`, and
        `usedGpuMemory` in bytes, None if the driver does not report it."""
        return self._of_device("nvmlDeviceGetComputeRunningProcesses")

    def energy_j(self) -> Reading[float]:
        """The energy counter, in joules since the driver was loaded."""
        if self.sliced:
            return missing_reading(SLICED)
        return self._of_board("nvmlDeviceGetTotalEnergyConsumption", convert=_from_milli)

    def sample(self) -> dict[str, Reading[Any]]:
        """Momentary readings, and counters since the driver was loaded. Energy is read first, closest to the end of the
        timed work.

        `power_w` is averaged by the driver (over a second from Ampere on, except GA100), `temperature_margin_c` are
        degrees below the slow-down temperature, and `thermal_slowdown_s` and `power_slowdown_s` are the cumulative time
        in which heat or the power limit reduced the clocks.
        """
        energy = self.energy_j()
        temperature = self._of_board("nvmlDeviceGetTemperature", "NVML_TEMPERATURE_GPU", convert=float)
        return {
            "energy_j": energy,
            "power_w": missing_reading(SLICED)
            if self.sliced
            else self._of_board("nvmlDeviceGetPowerUsage", convert=_from_milli),
            **self.clocks(),
            "temperature_c": temperature,
            "temperature_margin_c": self._margin(temperature),
            "thermal_slowdown_s": self._slowdown_s("NVML_PERF_POLICY_THERMAL"),
            "power_slowdown_s": self._slowdown_s("NVML_PERF_POLICY_POWER"),
        }

    def clocks(self) -> dict[str, Reading[Any]]:
        """The current clock, and as `events` the bits of the reasons for it: two calls, for use while work is
        queued."""
        return {
            "sm_clock_hz": self._clock("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),
            "events": self._of_board("nvmlDeviceGetCurrentClocksEventReasons"),
        }

    def facts(self) -> dict[str, Reading[Any]]:
        """Properties and settings. `power_limit_w` is the limit in force; `corrected_errors` and `uncorrected_errors`
        count ECC errors since the driver was loaded; `clocks_need_root` says whether only root may set the clocks."""
        board = self._of_board
        return {
            "name": self._of_device("nvmlDeviceGetName"),
            "uuid": read_uuid(self._nvml, self._handle),
            "driver": call_nvml(self._nvml, "nvmlSystemGetDriverVersion"),
            "capability": call_nvml(self._nvml, "nvmlDeviceGetCudaComputeCapability", self._handle, convert=tuple),
            "power_limit_w": board("nvmlDeviceGetEnforcedPowerLimit", convert=_from_milli),
            "default_power_limit_w": board("nvmlDeviceGetPowerManagementDefaultLimit", convert=_from_milli),
            "max_sm_clock_hz": self._clock("nvmlDeviceGetMaxClockInfo", "NVML_CLOCK_SM"),
            "max_memory_clock_hz": self._clock("nvmlDeviceGetMaxClockInfo", "NVML_CLOCK_MEM"),
            "slowdown_temperature_c": self._slowdown_c,
            "ecc": board("nvmlDeviceGetEccMode", convert=_current_mode),
            "corrected_errors": self._ecc_errors("NVML_MEMORY_ERROR_TYPE_CORRECTED"),
            "uncorrected_errors": self._ecc_errors("NVML_MEMORY_ERROR_TYPE_UNCORRECTED"),
            "mig": self._mig,
            "persistence": board("nvmlDeviceGetPersistenceMode", convert=bool),
            "clocks_need_root": board(
                "nvmlDeviceGetAPIRestriction", "NVML_RESTRICTED_API_SET_APPLICATION_CLOCKS", convert=bool
            ),
        }

    def _margin(self, temperature: Reading[float]) -> Reading[float]:
        """Computed from the threshold; from Ada on NVML reports the distance instead."""
        threshold = self._slowdown_c
        if threshold.value is not None and temperature.value is not None:
            return Reading(value=threshold.value - temperature.value)
        return self._of_board("nvmlDeviceGetMarginTemperature", convert=float)

    def _clock(self, function: str, clock: str) -> Reading[float]:
        return self._of_board(function, clock, convert=lambda megahertz: megahertz * 1e6)

    def _slowdown_s(self, policy: str) -> Reading[float]:
        return self._of_board("nvmlDeviceGetViolationStatus", policy, convert=lambda status: status.violationTime / 1e9)

    def _ecc_errors(self, kind: str) -> Reading[int]:
        return self._of_board("nvmlDeviceGetTotalEccErrors", kind, "NVML_VOLATILE_ECC")

    def _of_device(self, function: str, *arguments: Any) -> Reading[Any]:
        return call_nvml(self._nvml, function, self._handle, *arguments)

    def _of_board(self, function: str, *arguments: Any, convert: Callable[[Any], Any] = _identity) -> Reading[Any]:
        return call_nvml(self._nvml, function, self._board, *arguments, convert=convert)


def open_device(uuid: str | None = None, environment: Mapping[str, str] | None = None) -> Reading[NvmlDevice]:
    """The device that CUDA numbers 0, which stays open until this process ends; missing with the reason if there is
    none.

    Args:
        uuid: UUID of the device, if known (from torch, after CUDA is initialised). It takes precedence over the
            environment, whose numbers differ if CUDA sorts its devices by speed.
        environment: contains CUDA_VISIBLE_DEVICES; None for this process's.
    """
    return _find_device(_initialise(), uuid, environment)


@contextlib.contextmanager
def device_session(environment: Mapping[str, str] | None = None) -> Iterator[Reading[NvmlDevice]]:
    """The device that CUDA numbers 0, closed after the block; missing with the reason if there is none."""
    with nvml_session() as nvml:
        yield _find_device(nvml, None, environment)


def _find_device(nvml: Reading[Any], uuid: str | None, environment: Mapping[str, str] | None) -> Reading[NvmlDevice]:
    if nvml.value is None:
        return missing_reading(nvml.reason)
    visible = visible_devices(os.environ if environment is None else environment)
    if uuid is not None:
        handle = find_by_uuid(nvml.value, uuid)
    elif visible == ():
        handle = missing_reading(f"{VARIABLE} hides every device")
    else:
        handle = get_handle(nvml.value, visible[0] if visible else 0)
    return handle.then(lambda found: NvmlDevice(nvml.value, found))


def compute_capability(index: int) -> Reading[tuple[int, int]]:
    """Major and minor compute capability of the GPU with this NVML index."""
    with nvml_session() as nvml:
        if nvml.value is None:
            return missing_reading(nvml.reason)
        handle = get_handle(nvml.value, index).value
        return call_nvml(nvml.value, "nvmlDeviceGetCudaComputeCapability", handle, convert=tuple)


def _from_milli(value: int) -> float:
    return value / 1e3


def _current_mode(modes: list[int]) -> bool:
    """The mode in force; the second entry is the mode after the next reset."""
    return bool(modes[0])


# --- devices of a process ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class VisibleGpu:
    """A GPU that a process may use, or a MIG instance of one."""

    entry: int | str
    """Its entry in CUDA_VISIBLE_DEVICES."""
    name: Reading[str]
    board: Reading[str]
    """UUID of the GPU, or of the GPU that contains the instance: instances of one board share its resources."""
    power_limit_w: Reading[float]
    """Power limit of the board that is in force."""

    @property
    def kind(self) -> str:
        """Name and power limit as text: equal for two GPUs with the same performance."""
        limit_w = self.power_limit_w.value
        return f"{self.name.value}" + ("" if limit_w is None else f" at {limit_w:.0f} W")


def shared_boards(gpus: Iterable[VisibleGpu]) -> list[list[VisibleGpu]]:
    """Groups of devices that are parts of one GPU and would disturb each other; unknown boards are left out."""
    by: dict[str, list[VisibleGpu]] = {}
    for gpu in gpus:
        if gpu.board.value is not None:
            by.setdefault(gpu.board.value, []).append(gpu)
    return [parts for parts in by.values() if len(parts) > 1]


def describe_gpus(gpus: Iterable[VisibleGpu]) -> str:
    """The devices as text, by their entries in CUDA_VISIBLE_DEVICES."""
    return " and ".join(str(gpu.entry) for gpu in gpus)


def visible_gpus(environment: Mapping[str, str] | None = None) -> Reading[tuple[VisibleGpu, ...]]:
    """The GPUs that `environment` (None: this process's) makes visible to CUDA, in its order; all for an empty one."""
    with nvml_session() as nvml:
        if nvml.value is None:
            return missing_reading(nvml.reason)
        entries = visible_devices(os.environ if environment is None else environment)
        if entries is None:
            entries = tuple(range(call_nvml(nvml.value, "nvmlDeviceGetCount").value or 0))
        return Reading(value=tuple(_describe(nvml.value, entry) for entry in entries))


def _describe(nvml: Any, entry: int | str) -> VisibleGpu:
    handle = get_handle(nvml, entry)
    if not handle.known:
        unknown: Reading[Any] = missing_reading(handle.reason)
        return VisibleGpu(entry=entry, name=unknown, board=unknown, power_limit_w=unknown)
    board = read_board(nvml, handle.value).value or handle.value
    return VisibleGpu(
        entry=entry,
        name=call_nvml(nvml, "nvmlDeviceGetName", handle.value),
        board=read_uuid(nvml, board),
        power_limit_w=call_nvml(nvml, "nvmlDeviceGetEnforcedPowerLimit", board, convert=_from_milli),
    )


# --- other processes --------------------------------------------------------------------------------------------------
# Processes of the same run do not count: trials that take turns are alive together, and all of them descend from one
# parent (a trial is forked by a zygote, which the parent of the run started).

GENERATIONS = 2
"""Process generations from a trial up to the parent of its run."""


def find_neighbours(device: NvmlDevice, *, generations: int = GENERATIONS) -> dict[str, Reading[int]]:
    """The processes that share the device with the run that this process belongs to: `others`, the number of listed
    processes outside the run, `others_bytes`, their device memory, and `hidden_bytes`, memory in use without a listed
    process.

    Args:
        device: an open device.
        generations: how far above this process the run's parent is; 0 if this process is the parent.
    """
    listed, used = device.occupants(), device.memory().then(lambda memory: int(memory.used))
    processes, unclear = listed.value or [], listed.reason
    parent = list(itertools.islice(_ancestors(os.getpid()), generations + 1))[-1]
    others = [one for one in processes if parent not in _ancestors(one.pid)]
    unmapped = [one for one in processes if not Path(f"/proc/{one.pid}").exists()]
    if unmapped and os.getpid() not in [one.pid for one in processes]:  # PIDs of another namespace, perhaps its own
        unclear = (
            f"{len(unmapped)} listed processes have PIDs that do not exist in this container, so none of them can "
            "be distinguished from this run's own"
        )
    total: Reading[int] = missing_reading(listed.reason) if listed.value is None else _sum_memory(processes)
    hidden = (
        missing_reading(used.reason)
        if used.value is None
        else total.then(lambda size: max(0, (used.value or 0) - size))
    )
    return {
        "others": missing_reading(unclear) if unclear else Reading(value=len(others)),
        "others_bytes": missing_reading(unclear) if unclear else _sum_memory(others),
        "hidden_bytes": hidden,
    }


def _sum_memory(processes: Iterable[Any]) -> Reading[int]:
    sizes = [one.usedGpuMemory for one in processes]
    if None in sizes:
        return missing_reading("the driver does not report the memory of each process")
    return Reading(value=sum(map(int, sizes)))


def _ancestors(pid: int) -> Iterator[int]:
    """The process itself, its parent, and so on, as far as they are visible."""
    while pid > 0:
        yield pid
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):  # the process has just ended, or belongs to another container
            return
