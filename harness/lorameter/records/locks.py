"""One process at a time makes a thing that several may want: a model in the cache, an environment, a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lorameter.errors import UsageError

ASKING_S = 1.0
"""How long a process that only asks (`is_locked`) may hold up one that wants the lock."""


@contextmanager
def locked(target: Path, waiting: str, report: Callable[[str], object]) -> Iterator[None]:
    """Hold the lock of `target` for the block; `waiting` is reported where another process has it."""
    import filelock

    target.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(lock_of(target))
    try:
        held = lock.acquire(timeout=0)
    except filelock.Timeout:
        report(waiting)
        held = lock.acquire()
    with held:
        yield


@contextmanager
def alone(target: Path, refusal: str) -> Iterator[None]:
    """Hold the lock of `target` for the block; does not wait for another process.

    Raises:
        UsageError: another process has it; `refusal` is the message.
    """
    import filelock

    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = filelock.FileLock(lock_of(target)).acquire(timeout=ASKING_S)
    except filelock.Timeout:
        raise UsageError(refusal) from None
    with held:
        yield


def is_locked(target: Path) -> bool:
    """Whether a process holds the lock of `target`; one that was killed holds none."""
    import filelock

    if not lock_of(target).is_file():
        return False
    lock = filelock.FileLock(lock_of(target))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    except OSError:  # a read-only copy is not being written
        return False
    lock.release()
    return False


def lock_of(target: Path) -> Path:
    """The file that is locked."""
    return target.with_name(f"{target.name}.lock")
