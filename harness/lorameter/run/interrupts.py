"""Handles signals that stop a run: INT (Ctrl-C), TERM (SLURM, `timeout`, `docker stop`) and HUP (a closed terminal).

A run that is stopped ends its trials, saves their records, cleans up and prints how to resume it. A second Ctrl-C
during the cleanup would lose those records. So a signal raises an exception only inside `interruptible` blocks, in
which the process waits; elsewhere it is stored, and the next `interruptible` block raises it at its start. After that,
later signals are ignored. KILL ends the run at once, and the next run removes leftover files.

A signal that was ignored from the start, as HUP under `nohup`, stays ignored.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from lorameter.machine.processes import STOP_SIGNALS


class StopRequested(KeyboardInterrupt):
    """This process received a signal to end."""


class InterruptHandler:
    """Handles signals inside a `with` block; a signal that no `interruptible` block has raised is raised at its end.

    Python runs signal handlers in the main thread; in another thread this does nothing.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self._received = ""
        self._raised = self._waiting = False

    def __enter__(self) -> InterruptHandler:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # None: set outside of Python, which cannot restore it
                    self._before[number] = before
                    signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if error is None:
            self._raise_received()

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block in which a signal raises `StopRequested` at once; an earlier signal raises it at the start."""
        self._raise_received()
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name
        if self._waiting:
            self._raise_received()

    def _raise_received(self) -> None:
        """Raise `StopRequested` for a signal, but only once."""
        if self._received and not self._raised:
            self._raised = True
            raise StopRequested(self._received)
