"""Who else holds memory on the device, and what can be said where a container does not let one see.

NVML lists processes by the numbers of the machine. In a container with process numbers of its own an older driver lists
numbers that mean nothing there, or none at all, so that an empty list does not mean an empty GPU. What then still
shows is memory: what the device has in use beyond what the listed processes account for.

A run's own processes are no neighbours: trials that take turns live side by side, and all of them descend from one
parent (a trial is forked by a zygote, which the parent of the run has started).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lorameter.machine.nvml import NvmlDevice
from lorameter.machine.reading import Reading, missing
from lorameter.records.units import format_bytes

UNEXPLAINED_LIMIT = 512 * 2**20
"""Bytes in use that no process accounts for before somebody is taken to be hidden. A compute process takes 0.3 to
0.6 GiB for its context alone; a display server without one takes less."""
FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""Name of the machine's own process numbers (PROC_PID_INIT_INO in the kernel's proc_ns.h)."""
GENERATIONS = 2
"""From a trial up to the parent of its run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """Who is on the device beside this run, in bytes of device memory."""

    own_bytes: Reading[int]
    """What this process holds, its CUDA context included."""
    used_bytes: Reading[int]
    """What all processes and the display hold, told of or not."""
    others: Reading[tuple[int, ...]]
    """Numbers of the processes that do not belong to this run."""
    others_bytes: Reading[int]
    """What those hold together."""
    hidden_bytes: Reading[int]
    """In use and not accounted for by any process on the list; missing where the list does not say enough."""
    statement: str
    """What a reader must know where the list cannot be trusted; empty where it can."""


def neighbours_of(device: NvmlDevice, *, generations: int = GENERATIONS, proc: Path = Path("/proc")) -> Neighbours:
    """Who shares the device with the run that this process belongs to.

    Args:
        device: an open device.
        generations: how far above this process the run's parent is; 0 where this process is the parent itself.
        proc: where the kernel tells of processes.
    """
    listed, used = device.occupants(), device.memory().then(lambda told: told.used)
    if listed.value is None:
        return Neighbours(
            own_bytes=missing(listed.reason),
            used_bytes=used,
            others=missing(listed.reason),
            others_bytes=missing(listed.reason),
            hidden_bytes=missing(listed.reason),
            statement=f"other processes on the device cannot be seen ({listed.reason})",
        )
    own = [one.bytes for one in listed.value if one.pid == os.getpid()]
    # A number that no process here has is another container's, or ours as the machine numbers it.
    strangers = [one for one in listed.value if not (proc / str(one.pid)).exists()]
    head = _head(proc, generations)
    others = [one for one in listed.value if not _descends(one.pid, head, proc)]
    translated = bool(own) or not strangers
    unclear = (
        f"{len(strangers)} listed processes have numbers that mean nothing in this container, so none of them can be "
        "told from this run's own"
    )
    sizes = [one.bytes for one in others]
    holdings: Reading[int]
    if not translated:
        holdings = missing(unclear)
    elif any(size is None for size in sizes):
        holdings = missing("the driver does not say how much memory each process holds")
    else:
        holdings = Reading(value=sum(size or 0 for size in sizes))
    hidden = _hidden(used, [one.bytes for one in listed.value])
    return Neighbours(
        own_bytes=_own(own, unclear if not translated else "this process is not listed as holding device memory"),
        used_bytes=used,
        others=Reading(value=tuple(one.pid for one in others)) if translated else missing(unclear),
        others_bytes=holdings,
        hidden_bytes=hidden,
        statement=_statement(hidden, "" if translated else unclear, private=_private_numbers(proc)),
    )


def _own(sizes: list[int | None], reason: str) -> Reading[int]:
    if not sizes:
        return missing(reason)
    if sizes[0] is None:
        return missing("the driver does not say how much memory each process holds")
    return Reading(value=sizes[0])


def _hidden(used: Reading[int], sizes: list[int | None]) -> Reading[int]:
    if used.value is None:
        return missing(used.reason)
    if any(size is None for size in sizes):
        return missing("the driver does not say how much memory each process holds")
    return Reading(value=max(0, used.value - sum(size or 0 for size in sizes)))


def _statement(hidden: Reading[int], unclear: str, *, private: bool) -> str:
    if unclear:
        return unclear
    if hidden.value is None or hidden.value <= UNEXPLAINED_LIMIT:
        return ""
    why = "this container has process numbers of its own, which hides others" if private else "others are hidden"
    return f"{format_bytes(hidden.value)} of device memory are in use and no listed process holds them: {why}"


def _private_numbers(proc: Path) -> bool:
    try:
        return os.readlink(proc / "self" / "ns" / "pid") != FIRST_PID_NAMESPACE  # noqa: PTH115 a link to no path
    except OSError:
        return False


def _head(proc: Path, generations: int) -> int:
    """The process from which a run descends: so many generations up from this one, as far as there are any."""
    head = os.getpid()
    for _ in range(generations):
        above = _parent(proc, head)
        if above == 0:
            break
        head = above
    return head


def _descends(pid: int, head: int, proc: Path) -> bool:
    """Whether a process is the head or has it among those above it."""
    seen: set[int] = set()
    while pid > 0 and pid not in seen:
        if pid == head:
            return True
        seen.add(pid)
        pid = _parent(proc, pid)
    return False


def _parent(proc: Path, pid: int) -> int:
    try:
        return int((proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):  # it has just ended, or belongs to another container
        return 0
