"""Being told to stop: Ctrl-C, TERM (SLURM, `timeout`, `docker stop`) and HUP (a terminal that is closed) are one thing.

Whoever is told so ends what is under way, saves it, takes down what was put up, and says how to go on. That takes a
moment, and a second Ctrl-C in it would cost what the first one saved. So a stop is taken where a process waits, in
blocks that say so (`interruptible`), and nowhere else: between them it is remembered, and the next such block does not
begin. Once it has been taken nothing interrupts what it sets off; who has no time for that sends KILL, and the next run
removes what is left.

At a terminal the first Ctrl-C waits for the trials under way, which can be worth many minutes, and the second one ends
them at once. TERM, HUP, and a Ctrl-C that no terminal sent end them the first time.

A signal that was ignored from the start, as HUP under `nohup`, goes on being ignored.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


WAITING = b"\nCtrl-C: waiting for the trials under way, which will be reported; press it again to stop at once.\n"


class StopRequested(KeyboardInterrupt):
    """Somebody wants this process to end."""


class InterruptHandler:
    """While it is open it hears the signals in place of whoever heard them before. A stop that it heard and that no
    block took is raised at its end.

    Signals reach the main thread only: in another one it hears nothing, and all is as without it.
    """

    def __init__(self, *, patient: bool = False) -> None:
        """`patient`: whether the first Ctrl-C waits for the end of a block that says that it is worth it."""
        self._patient, self._worth = patient, False
        self._before: dict[signal.Signals, Any] = {}
        self._told: str | None = None
        self._taken = False
        self._deferred = False
        """Whether the only stop so far was a first Ctrl-C that waits."""
        self._waiting = False

    def __enter__(self) -> InterruptHandler:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # None: not from Python, and not to be put back by it
                    self._before[number] = before
                    signal.signal(number, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if error is None and self._told is not None and not self._taken and not self._deferred:
            self._take()

    @contextlib.contextmanager
    def interruptible(self, *, worth_waiting: bool = False) -> Iterator[None]:
        """A block that a stop ends at once. Raises `StopRequested`, and does not begin after one that was not taken.

        `worth_waiting`: whether the first Ctrl-C at a terminal waits for its end.
        """
        if self._told is not None and not self._taken:
            self._take()
        self._waiting, self._worth = True, worth_waiting
        try:
            yield
        finally:
            self._waiting = self._worth = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        first, self._told = self._told is None, signal.Signals(number).name
        self._deferred = first and self._patient and self._worth and number == signal.SIGINT
        if self._deferred:
            os.write(2, WAITING)  # nothing that a signal might have interrupted in the middle
            return
        if self._waiting and not self._taken:
            self._take()

    def _take(self) -> None:
        self._taken = True
        raise StopRequested(self._told)
