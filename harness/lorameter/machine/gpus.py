"""The GPUs of a machine: which ones a process may use, which are parts of one board, and which processes use them.

NVML lists processes by the PIDs of the host. In a container with a PID namespace, an older driver lists PIDs that are
meaningless there, or none, so an empty list does not mean an idle GPU. Memory still reveals a hidden process: the bytes
in use exceed the sum of the listed processes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorameter.machine.nvml import NvmlDevice, ask, board_of, handle_of, nvml_session, uuid_of, visible_devices
from lorameter.machine.reading import Reading, missing
from lorameter.records.units import format_bytes


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
            return missing(nvml.reason)
        entries = visible_devices(os.environ if environment is None else environment)
        if entries is None:
            entries = tuple(range(ask(nvml.value, "nvmlDeviceGetCount").value or 0))
        return Reading(value=tuple(_describe(nvml.value, entry) for entry in entries))


def _describe(nvml: Any, entry: int | str) -> VisibleGpu:
    handle = handle_of(nvml, entry)
    if not handle.known:
        unknown: Reading[Any] = missing(handle.reason)
        return VisibleGpu(entry=entry, name=unknown, board=unknown, power_limit_w=unknown)
    board = board_of(nvml, handle.value).value or handle.value
    return VisibleGpu(
        entry=entry,
        name=ask(nvml, "nvmlDeviceGetName", handle.value),
        board=uuid_of(nvml, board),
        power_limit_w=ask(nvml, "nvmlDeviceGetEnforcedPowerLimit", board, convert=lambda milliwatts: milliwatts / 1e3),
    )


# --- other processes --------------------------------------------------------------------------------------------------
# Processes of the same run do not count: trials that take turns are alive together, and all of them descend from one
# parent (a trial is forked by a zygote, which the parent of the run started).

UNEXPLAINED_LIMIT = 512 * 2**20
"""Bytes in use without a listed process from which a hidden process is assumed. The context of a compute process takes
0.3 to 0.6 GiB; a display server without a CUDA context takes less."""
FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""The machine's own PID namespace (PROC_PID_INIT_INO in the kernel's proc_ns.h)."""
GENERATIONS = 2
"""Process generations from a trial up to the parent of its run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """Processes on the device, in bytes of device memory."""

    used_bytes: Reading[int]
    """Memory of all processes and the display, listed or not."""
    others: Reading[tuple[int, ...]]
    """PIDs of processes outside this run."""
    others_bytes: Reading[int]
    """Memory of `others`."""
    hidden_bytes: Reading[int]
    """Memory in use without a listed process."""
    statement: str
    """Why the list cannot be trusted; empty if it can."""


def neighbours_of(device: NvmlDevice, *, generations: int = GENERATIONS, proc: Path = Path("/proc")) -> Neighbours:
    """The processes that share the device with the run that this process belongs to.

    Args:
        device: an open device.
        generations: how far above this process the run's parent is; 0 if this process is the parent.
        proc: mount point of procfs.
    """
    listed, used = device.occupants(), device.memory().then(lambda memory: int(memory.used))
    processes, unclear = listed.value or [], listed.reason
    statement = f"other processes on the device cannot be seen ({unclear})" if unclear else ""
    parent = list(itertools.islice(_ancestors(os.getpid(), proc), generations + 1))[-1]
    others = [one for one in processes if parent not in _ancestors(one.pid, proc)]
    unmapped = [one for one in processes if not (proc / str(one.pid)).exists()]
    if unmapped and os.getpid() not in [one.pid for one in processes]:  # PIDs of another namespace, perhaps its own
        unclear = statement = (
            f"{len(unmapped)} listed processes have numbers that mean nothing in this container, so none of them can "
            "be distinguished from this run's own"
        )
    total: Reading[int] = missing(listed.reason) if listed.value is None else _sum(processes)
    hidden = missing(used.reason) if used.value is None else total.then(lambda size: max(0, (used.value or 0) - size))
    return Neighbours(
        used_bytes=used,
        others=missing(unclear) if unclear else Reading(value=tuple(int(one.pid) for one in others)),
        others_bytes=missing(unclear) if unclear else _sum(others),
        hidden_bytes=hidden,
        statement=statement or _describe_hidden_memory(hidden.value or 0, proc),
    )


def _sum(processes: Iterable[Any]) -> Reading[int]:
    sizes = [one.usedGpuMemory for one in processes]
    if None in sizes:
        return missing("the driver does not say how much memory each process holds")
    return Reading(value=sum(map(int, sizes)))


def _describe_hidden_memory(hidden_bytes: int, proc: Path) -> str:
    if hidden_bytes <= UNEXPLAINED_LIMIT:
        return ""
    private = has_own_pids(proc)
    reason = "this container has process numbers of its own, which hides others" if private else "others are hidden"
    return f"{format_bytes(hidden_bytes)} of device memory are in use and no listed process holds them: {reason}"


def has_own_pids(proc: Path) -> bool:
    """Whether this process is in a container's PID namespace."""
    try:
        return os.readlink(proc / "self/ns/pid") != FIRST_PID_NAMESPACE  # noqa: PTH115 a link to no path
    except OSError:
        return False


def _ancestors(pid: int, proc: Path) -> Iterator[int]:
    """The process itself, its parent, and so on, as far as they are visible."""
    while pid > 0:
        yield pid
        try:
            pid = int((proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):  # the process has just ended, or belongs to another container
            return
