"""File locks that ensure that only one process makes a cached model, an environment or a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lorameter.errors import UsageError

ASKING_S = 1.0
"""Maximum time for which a process that only tests the lock (`is_locked`) may delay one that wants it."""


@contextmanager
def locked(target: Path, waiting: str, report: Callable[[str], object]) -> Iterator[None]:
    """Hold the lock of `target` during the block; `waiting` is reported if another process holds it."""
    import filelock

    target.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(lock_of(target))
    try:
        acquired = lock.acquire(timeout=0)
    except filelock.Timeout:
        report(waiting)
        acquired = lock.acquire()
    with acquired:
        yield


@contextmanager
def alone(target: Path, refusal: str) -> Iterator[None]:
    """Hold the lock of `target` during the block, without waiting for another process.

    Raises:
        UsageError: another process holds it; `refusal` is the message.
    """
    import filelock

    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        acquired = filelock.FileLock(lock_of(target)).acquire(timeout=ASKING_S)
    except filelock.Timeout:
        raise UsageError(refusal) from None
    with acquired:
        yield


def is_locked(target: Path) -> bool:
    """Whether a process holds the lock of `target`; a killed process holds no lock."""
    import filelock

    if not lock_of(target).is_file():
        return False
    lock = filelock.FileLock(lock_of(target))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    except OSError:  # a read-only copy has no writer
        return False
    lock.release()
    return False


def lock_of(target: Path) -> Path:
    """The lock file of a target."""
    return target.with_name(f"{target.name}.lock")
