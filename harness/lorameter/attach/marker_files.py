"""Hidden files that a wrapped command leaves beside its run while it runs, and what is left of them by the dead.

`.RUN.seen` says that a Python of it has loaded the hook, `.RUN.ranks/` gathers its ranks, and `.RUN.wrapped` holds the
command as it was typed and is locked by the program that wraps it as long as that lives. One that is killed removes
none of them; the next does, unless the command goes on without it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from lorameter.attach.variables import RUN
from lorameter.machine.orphan_reaper import marked
from lorameter.records.os_errors import naming

_NAMED = re.compile(r"\.(?P<run>.+)\.(?:seen|ranks|wrapped)")


def seen_of(run: Path) -> Path:
    """The file that the hook makes."""
    return run.with_name(f".{run.name}.seen")


def ranks_of(run: Path) -> Path:
    """The folder that ranks write into."""
    return run.with_name(f".{run.name}.ranks")


def lacking_in(seen: Path) -> str:
    """What an interpreter that has loaded the hook lacks to be measured, in words; nothing where none does."""
    try:
        return seen.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _wrapped_of(run: Path) -> Path:
    return run.with_name(f".{run.name}.wrapped")


@contextlib.contextmanager
def wrapping(run: Path, command: str = "") -> Iterator[None]:
    """Meanwhile this process wraps the command of a run, as it is written here; at the end no trace of that is left.

    Raises:
        OSError: the disk refuses.
    """
    path = _wrapped_of(run)
    with path.open("wb") as held:
        try:
            with naming(path):
                held.write(os.fsencode(command))
                held.flush()
            with contextlib.suppress(OSError):  # a disk without locks: what is left there stays
                fcntl.flock(held, fcntl.LOCK_EX)
            yield
        finally:
            remove(run)


def command_of(run: Path) -> str:
    """The command that is wrapped to measure a run; nothing where none is."""
    try:
        return os.fsdecode(_wrapped_of(run).read_bytes())
    except OSError:
        return ""


def remove_abandoned(runs: Path) -> None:
    """Remove what wrapping programs that were killed have left in a folder of runs."""
    with contextlib.suppress(OSError):
        left = {found["run"] for path in runs.iterdir() if (found := _NAMED.fullmatch(path.name))}
        for run in (runs.absolute() / name for name in left):
            if _is_abandoned(run):
                remove(run)


def _is_abandoned(run: Path) -> bool:
    try:
        with _wrapped_of(run).open("r+") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        pass  # removed already, and made again by the command
    except OSError:
        return False
    return not marked(f"{RUN}={run}".encode())  # a command that goes on without it


def remove(run: Path) -> None:
    """Remove what a command has left beside its run, as far as it is there."""
    shutil.rmtree(ranks_of(run), ignore_errors=True)
    for path in (seen_of(run), _wrapped_of(run)):
        path.unlink(missing_ok=True)
