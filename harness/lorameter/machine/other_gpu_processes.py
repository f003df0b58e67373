"""Memory that other processes hold on the device, and what cannot be seen from inside a container.

NVML lists processes by the PIDs of the machine. In a container with a PID namespace an older driver lists PIDs that
mean nothing there, or none, so that an empty list does not mean an empty GPU. Memory still shows: the bytes in use
beyond the sum of the listed processes.

Processes of the same run do not count: trials that take turns are alive together, and all of them descend from one
parent (a trial is forked by a zygote, which the parent of the run started).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lorameter.machine.nvml import NvmlDevice
from lorameter.machine.reading import Reading, missing
from lorameter.records.units import format_bytes

UNEXPLAINED_LIMIT = 512 * 2**20
"""Bytes in use without a listed process from which a hidden one is assumed. The context of a compute process takes 0.3
to 0.6 GiB; a display server without one takes less."""
FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""The machine's own PID namespace (PROC_PID_INIT_INO in the kernel's proc_ns.h)."""
GENERATIONS = 2
"""From a trial up to the parent of its run."""
_NO_SIZES = "the driver does not say how much memory each process holds"


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """Processes on the device, in bytes of device memory."""

    own_bytes: Reading[int]
    """Of this process, with its CUDA context."""
    used_bytes: Reading[int]
    """Of all processes and the display, listed or not."""
    others: Reading[tuple[int, ...]]
    """PIDs that do not belong to this run."""
    others_bytes: Reading[int]
    """The sum over those."""
    hidden_bytes: Reading[int]
    """In use without a listed process."""
    statement: str
    """Why the list cannot be trusted; empty if it can."""


def neighbours_of(device: NvmlDevice, *, generations: int = GENERATIONS, proc: Path = Path("/proc")) -> Neighbours:
    """The processes that share the device with the run that this process belongs to.

    Args:
        device: an open device.
        generations: how far above this process the run's parent is; 0 if this process is the parent.
        proc: mount point of procfs.
    """
    listed, used = device.occupants(), device.memory().then(lambda memory: memory.used)
    if listed.value is None:
        unknown: Reading[int] = missing(listed.reason)
        return Neighbours(
            own_bytes=unknown,
            used_bytes=used,
            others=missing(listed.reason),
            others_bytes=unknown,
            hidden_bytes=unknown,
            statement=f"other processes on the device cannot be seen ({listed.reason})",
        )
    parent = list(itertools.islice(_ancestors(os.getpid(), proc), generations + 1))[-1]
    own = [one.bytes for one in listed.value if one.pid == os.getpid()]
    others = [one for one in listed.value if parent not in _ancestors(one.pid, proc)]
    strangers = [one for one in listed.value if not (proc / str(one.pid)).exists()]
    unclear = ""
    if strangers and not own:  # PIDs of another namespace, among which this process's own may be
        unclear = (
            f"{len(strangers)} listed processes have numbers that mean nothing in this container, so none of them can "
            "be told from this run's own"
        )
    total = _sum([one.bytes for one in listed.value])
    hidden = missing(used.reason) if used.value is None else total.then(lambda size: max(0, (used.value or 0) - size))
    return Neighbours(
        own_bytes=_sum(own) if own else missing(unclear or "this process is not listed as holding device memory"),
        used_bytes=used,
        others=missing(unclear) if unclear else Reading(value=tuple(one.pid for one in others)),
        others_bytes=missing(unclear) if unclear else _sum([one.bytes for one in others]),
        hidden_bytes=hidden,
        statement=unclear or _statement(hidden.value or 0, proc),
    )


def _sum(sizes: list[int | None]) -> Reading[int]:
    known = [size for size in sizes if size is not None]
    return Reading(value=sum(known)) if len(known) == len(sizes) else missing(_NO_SIZES)


def _statement(hidden_bytes: int, proc: Path) -> str:
    if hidden_bytes <= UNEXPLAINED_LIMIT:
        return ""
    private = has_own_pids(proc)
    reason = "this container has process numbers of its own, which hides others" if private else "others are hidden"
    return f"{format_bytes(hidden_bytes)} of device memory are in use and no listed process holds them: {reason}"


def has_own_pids(proc: Path) -> bool:
    """Whether this process is in a PID namespace of a container."""
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
        except (OSError, ValueError, IndexError):  # it has just ended, or belongs to another container
            return
