"""Imports what follows a training, all of it at once and in a thread of its own.

An import allocates memory and frees most of it, in blocks between those that it keeps. What a training allocates later
may lie in these blocks, spread over more pages, and its steps may then miss the TLB more often. The C library gives
each thread an arena of its own, so what is freed in this thread is rarely reused by the training. That this makes steps
faster is not proven: in two sequential runs on a machine under load, the meter added 453 µs of CPU time a step
[174, 732] with the thread and 931 µs [641, 1221] without.

Neither torch nor any other module is imported here, so that what waits for a training may ask for this one.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

WATCHES = ("kernels_check.step_watch", "kernels_check.judges.paths")
"""What a step is watched by."""


def load(name: str) -> ModuleType:
    """A module that follows trainings, and with it what it imports once there is one.

    It is imported by the thread that asks where torch is not there yet, so that there is nothing of a training and much
    still to be imported; and where an import is under way already: this thread may hold the lock of a module that the
    other one would wait for, while it waits for the other one.

    Raises:
        ImportError: of this module; an error of the others is raised where they are needed.
    """
    if name not in sys.modules and "torch" in sys.modules and not _imports():
        with ThreadPoolExecutor(1) as thread:
            thread.submit(_load_all, name).result()
    return importlib.import_module(name)


def _load_all(name: str) -> None:
    """What cannot be imported here, as a module that only the main thread may, is imported again where it is needed."""
    from lorameter.attach.environment import DEFAULT_FOLLOWER, ENV_FOLLOWER

    follower = os.environ.get(ENV_FOLLOWER, DEFAULT_FOLLOWER).partition(":")[0]
    for one in (name, follower, *WATCHES):
        with contextlib.suppress(Exception):
            importlib.import_module(one)


def _imports() -> bool:
    """Whether this thread is inside the import of a module."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "_find_and_load" and frame.f_globals.get("__name__") == "importlib._bootstrap":
            return True
    return False
