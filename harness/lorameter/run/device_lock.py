"""Locks a device for one measurement at a time, because two would disturb each other.

The lock is a kernel lock (flock) on a file named after the device. So it ends with the process that holds it, and
waiting for it takes no CPU time. The file is in a folder shared by all users, and is never removed: otherwise two
processes could lock two files of the same name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from kernels_check.terminal import print_stderr
from lorameter.errors import InvalidRunError
from lorameter.run.workers import Executor

IfBusy = Literal["wait", "refuse", "share"]
"""The action if the device is in use: wait for the end of the other measurement · exit · measure at the same time."""
ENV_LOCKS = "LORAMETER_LOCKS"
SHARED_FOLDER = Path("/tmp")
"""The same folder for all users and jobs, whatever their TMPDIR is."""


@contextlib.contextmanager
def hold_devices(executors: Iterable[Executor], if_busy: IfBusy) -> Iterator[bool]:
    """Lock the executors' devices inside the block. Yields whether it waited for another measurement, since free memory
    may have changed. On a file system without locks, nothing is locked.

    Each device is locked once, and always in the same order, so that two processes cannot deadlock.

    Args:
        executors: executors of the devices.
        if_busy: what to do if a device is in use; "share" takes no lock.

    Raises:
        InvalidRunError: a device is in use, and `if_busy` is "refuse".
    """
    waited = False
    devices = {executor.device_id() for executor in executors if if_busy != "share"}
    with contextlib.ExitStack() as stack:
        for device in sorted(devices):
            file = _open(device)
            if file is None:
                continue
            stack.callback(os.close, file)
            if _lock(file, wait=False):
                continue
            who = f"{_holder(file)} measures on this device ({device})"
            if if_busy == "refuse":
                raise InvalidRunError(f"{who}. Wait for it, or measure at the same time with --if-busy share.")
            print_stderr(
                f"{who}; waiting for its end. --if-busy refuse ends instead, --if-busy share measures at the same time."
            )
            waited = _lock(file, wait=True)
        yield waited


def _open(device: str) -> int | None:
    """The lock file of a device, which may belong to another user; None if it cannot be made."""
    name = f"lorameter-{re.sub(r'[^A-Za-z0-9-]+', '-', device)}.lock"
    path = Path(os.environ.get(ENV_LOCKS) or SHARED_FOLDER) / name
    common_flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe would block until something writes into it
    for flags in (os.O_RDONLY, os.O_RDONLY | os.O_CREAT | os.O_EXCL, os.O_RDONLY):  # another process may create it
        with contextlib.suppress(OSError):
            return os.open(path, flags | common_flags, 0o644)
    return None


def _lock(file: int, *, wait: bool) -> bool:
    """Whether the lock was taken; a file system without locks delays no measurement."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _holder(file: int) -> str:
    """The process that holds the lock, from the kernel's list; a process of another container has no PID here."""
    inode = os.fstat(file).st_ino
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            match = re.match(rf"\d+: FLOCK +ADVISORY +WRITE +(\d+) [0-9a-f]+:[0-9a-f]+:{inode} ", line)
            if match and match[1] != "0":
                return f"process {match[1]}"
    return "another process"
