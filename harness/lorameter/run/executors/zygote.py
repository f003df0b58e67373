"""The zygote as its parent sees it: greeted once, asked to fork and to reap, and found dead.

It is killed like any process (by an operator, by the kernel for want of memory), and what it would have forked has
nothing to do with that. So whoever asks it is told that it is gone, and can start another.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any

from lorameter.machine.processes import exit_words
from lorameter.records.record import Failure
from lorameter.run.executors import WorkerLostError
from lorameter.run.executors.channel import Channel, GarbledError
from lorameter.run.executors.forked import START_TIMEOUT_S, ForkedWorker

END_TIMEOUT_S = 10.0
"""A zygote that was greeted ends as soon as its parent hangs up, once it has reaped its children."""


class ZygoteLostError(Exception):
    """It is dead or does not answer; nothing was forked."""


class Zygote:
    """One zygote; `spawn` starts its process on a descriptor."""

    def __init__(self, spawn: Callable[[int], subprocess.Popen[bytes]]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs, contextlib.ExitStack() as stack:
            stack.callback(ours.close)
            self._process = spawn(theirs.fileno())
            stack.pop_all()
        self._control = Channel(ours)
        self._greeted = False

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    @property
    def lives(self) -> bool:
        """Whether its process runs. Where it does not its children have died with it, and their numbers are free."""
        return not self._control.closed_by_peer and self._process.poll() is None

    def greet(self) -> dict[str, Any] | None:
        """Wait until it has imported; None if it does not come to that."""
        hello = self._receive()
        self._greeted = hello is not None
        return hello

    def fork(self) -> ForkedWorker:
        """A fresh process.

        Raises:
            ZygoteLostError: the zygote is gone.
            WorkerLostError: it refuses, or the process ended before its first word.
        """
        with contextlib.ExitStack() as stack:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            stack.callback(ours.close)
            begin = time.monotonic()
            with theirs:
                self._control.send({"do": "fork"}, theirs)
            answer = self._receive()
            if answer is None:
                raise ZygoteLostError(self.last_words())
            pid = answer.get("pid")
            if not isinstance(pid, int):  # no trial is to blame, and none has begun
                message = str(answer.get("error", "the zygote does not say why"))
                raise WorkerLostError("not_run", Failure(phase="start", kind="CannotFork", message=message))
            stack.pop_all()
        worker = ForkedWorker(pid, Channel(ours), self)
        worker.greet(begin)
        return worker

    def reap(self, pid: int) -> int | None:
        """The exit status of a child that was told to end; None where it cannot be known."""
        self._control.send({"do": "reap", "pid": pid})
        status = (self._receive() or {}).get("status")
        return status if isinstance(status, int) else None

    def _receive(self) -> dict[str, Any] | None:
        """Its next word; None where it is gone, silent, or says what is none."""
        try:
            return self._control.receive(START_TIMEOUT_S)
        except GarbledError:
            self._process.kill()  # whatever it says next may belong to another question
            self._process.wait(END_TIMEOUT_S)
            return None

    def last_words(self) -> str:
        """How it ended, or that it is silent."""
        if self.lives:
            return f"the zygote gave no answer within {START_TIMEOUT_S:g} s"
        with contextlib.suppress(subprocess.TimeoutExpired):  # the connection closes a moment before the process ends
            self._process.wait(END_TIMEOUT_S)
        return f"the zygote ended with {exit_words(self._process.poll())}"

    def close(self) -> None:
        """End it; its children die with it. One that still imports hears nothing and is killed, as a silent one is."""
        silent = not self._greeted or (self._control.asked and self.lives)
        self._control.close()
        if silent:
            self._process.kill()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
