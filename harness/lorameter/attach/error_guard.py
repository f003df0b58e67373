"""What is ours inside somebody else's training can do it no harm.

An error of ours is told once, on the standard error that the process was started with, and from then on nothing of ours
is called any more. The training goes on as if it had never been followed, and whoever follows it learns that it was not
followed to its end, so that the run is unknown and no pass. What is no `Exception` is somebody's wish to end the
process, and goes through.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import traceback
import weakref
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from kernels_check.terminal import escape_control_chars
from lorameter.errors import redact, said_by

P = ParamSpec("P")
T = TypeVar("T")


class NotFollowedError(Exception):
    """The training was not followed to its end, for a reason of the meter's own."""


class ErrorGuard:
    """Calls what is ours, in the process that made it and until the first error. Not shared between threads."""

    def __init__(self) -> None:
        self.up = True
        """Whether what is ours is still called: not after an error, and not in a fork of the process."""
        _shields().add(self)
        self.on_error: Callable[[Exception], None] = _nothing
        """Is called once, after the error was told."""

    def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What the call returns; None where it is not called any more, or fails."""
        if not self.up:
            return None
        try:
            return call(*args, **kwargs)
        except Exception as error:
            self.stand_aside(error)
            return None

    def stand_aside(self, error: Exception) -> None:
        """From here on nothing of ours is called. For what runs in every step and calls by itself, while it is `up`."""
        self.up = False
        if isinstance(error, NotFollowedError):
            say(f"this training is not followed: {said_by(error)}")
        else:
            say(f"the meter has failed and stands aside; the training goes on without it: {said_by(error)}")
        with contextlib.suppress(Exception):
            self.on_error(error)


@functools.cache  # of the process: what is registered stays, however many trainings it follows
def _shields() -> weakref.WeakSet[ErrorGuard]:
    """All of this process. A fork takes them down: they are asked many times a step, and getpid is a system call."""
    shields: weakref.WeakSet[ErrorGuard] = weakref.WeakSet()

    def take_down() -> None:
        for shield in list(shields):
            shield.up = False

    os.register_at_fork(after_in_child=take_down)
    return shields


def without_frames(error: BaseException) -> BaseException:
    """An error like this one for later, with its traceback as a note: its frames hold what the script works with."""
    told = "".join(traceback.format_exception(error))
    try:
        found = type(error).__new__(type(error), *error.args)
        str(found)
    except Exception:
        found = RuntimeError(f"{type(error).__name__}: {error}")
    found.add_note(told)
    return found


def _nothing(error: Exception) -> None:
    """For a shield that nobody waits for."""


def say(text: str) -> None:
    """A line on the standard error that the process was started with, whatever the script has put in its place."""
    stream = sys.__stderr__
    with contextlib.suppress(Exception):
        if stream is not None:
            print(escape_control_chars(f"lorameter: {redact(text)}"), file=stream, flush=True)
