"""One process at a time makes a thing that several may want: a model in the cache, an environment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(target: Path, waiting: str, report: Callable[[str], object]) -> Iterator[None]:
    """Hold the lock beside `target` for the block; `waiting` is reported where another process has it."""
    import filelock

    target.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(target.with_name(f"{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        report(waiting)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
