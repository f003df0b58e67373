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
from collections.abc import Iterator
from types import FrameType

from lorameter.machine.processes import STOP_SIGNALS, handle_signals


class StopRequested(KeyboardInterrupt):
    """This process received a signal to end."""


class InterruptHandler:
    """Stores a signal, or raises it inside an `interruptible` block (`handle_interrupts`)."""

    def __init__(self) -> None:
        self._received = ""
        self._raised = self._waiting = False

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block in which a signal raises `StopRequested` at once; an earlier signal raises it at the start."""
        self.raise_received()
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Receive a signal."""
        self._received = signal.Signals(number).name
        if self._waiting:
            self.raise_received()

    def raise_received(self) -> None:
        """Raise `StopRequested` for a signal, but only once."""
        if self._received and not self._raised:
            self._raised = True
            raise StopRequested(self._received)


@contextlib.contextmanager
def handle_interrupts() -> Iterator[InterruptHandler]:
    """Handle signals inside the block; a signal that no `interruptible` block has raised is raised at its end. In
    another thread than the main one, nothing is handled."""
    handler = InterruptHandler()
    with handle_signals(STOP_SIGNALS, handler.handle):
        yield handler
    handler.raise_received()
