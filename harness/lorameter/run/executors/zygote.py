"""The zygote and the processes that it forks, as their parent sees them.

A zygote can be killed like any process (by an operator, by the kernel for want of memory); its children die with it.
What it would have forked next is not affected: the executor is informed that the zygote is gone, and starts another.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from typing import Any

from lorameter import wire
from lorameter.errors import LorameterError
from lorameter.machine.processes import exit_words, kill_group
from lorameter.records.record import Failure
from lorameter.run.executors import WorkerLostError
from lorameter.run.executors.process_worker import ProcessWorker

START_TIMEOUT_S = 180.0
"""Importing takes 3 to 5 s on a quiet machine; a cold disk and a busy one can make it a minute."""
END_TIMEOUT_S = 10.0
"""A zygote that was greeted ends as soon as its parent closes the connection, once it has reaped its children."""


class ZygoteLostError(Exception):
    """It is dead or does not answer; nothing was forked."""


class Zygote:
    """One zygote; `spawn` starts its process on a descriptor."""

    def __init__(self, spawn: Callable[[int], subprocess.Popen[bytes]]) -> None:
        self._control, theirs = wire.pair()
        with theirs, contextlib.ExitStack() as stack:
            stack.callback(self._control.close)
            self._process = spawn(theirs.fileno())
            stack.pop_all()
        self._silent = True
        """Whether it may not see that the connection is closed: it still imports, or gave no answer."""

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    @property
    def lives(self) -> bool:
        """Whether its process runs. Where it does not its children have died with it, and their numbers are free."""
        return self._process.poll() is None

    def greet(self) -> wire.Hello:
        """Wait until it has imported. Raises `ZygoteLostError`, and `GarbledError` where it speaks another protocol."""
        try:
            hello = wire.receive(self._control, wire.Hello, START_TIMEOUT_S)
        except (TimeoutError, wire.ClosedError):
            raise ZygoteLostError(self.last_words()) from None
        self._silent = False
        return hello

    def fork(self) -> ForkedWorker:
        """A fresh process.

        Raises:
            ZygoteLostError: the zygote is gone.
            WorkerLostError: it refuses, or the process ended before it greeted.
        """
        ours, theirs = wire.pair()
        begin = time.monotonic()
        try:
            with theirs:
                pid = self._call(wire.Command("fork"), int, theirs)
        except LorameterError as refusal:  # no trial is to blame, and none has begun
            ours.close()
            raise WorkerLostError("not_run", Failure(phase="start", kind="CannotFork", message=str(refusal))) from None
        except BaseException:
            ours.close()
            raise
        worker = ForkedWorker(pid, ours, self)
        worker.greet(begin)
        return worker

    def reap(self, pid: int) -> int | None:
        """The exit status of a child that was killed; None where it cannot be known."""
        with contextlib.suppress(ZygoteLostError):
            return self._call(wire.Command("reap", arguments={"pid": pid}), Any)  # type: ignore[no-any-return]
        return None

    def _call(self, command: wire.Command, kind: Any, attached: Connection | None = None) -> Any:
        try:
            wire.send(self._control, command)
            if attached is not None:
                send_handle(self._control, attached.fileno(), self.pid)
            return wire.receive_answer(self._control, kind, START_TIMEOUT_S)
        except (OSError, wire.ClosedError):  # TimeoutError is an OSError
            self._silent = True
        except wire.GarbledError:
            self._process.kill()  # what it sends next may belong to another command
        raise ZygoteLostError(self.last_words())

    def last_words(self) -> str:
        """How it ended, or that it is silent."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # the connection closes a moment before the process ends
            return f"the zygote ended with {exit_words(self._process.wait(0.5))}"
        return f"the zygote gave no answer within {START_TIMEOUT_S:g} s"

    def close(self) -> None:
        """End it; its children die with it. One that still imports, or gives no answer, is killed."""
        self._control.close()
        if self._silent:
            self._process.kill()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class ForkedWorker(ProcessWorker):
    """A process that a zygote has forked."""

    def __init__(self, pid: int, connection: Connection, zygote: Zygote) -> None:
        super().__init__(pid, connection)
        self._zygote = zygote
        self._ended = False
        self._code: int | None = None

    def greet(self, asked_monotonic_s: float) -> None:
        """Wait until it says when it began. Raises `WorkerLostError`."""
        with self.losses("start", START_TIMEOUT_S):
            hello = wire.receive(self.connection, wire.Hello, START_TIMEOUT_S)
        self.start_latency_s = hello.started_monotonic_s - asked_monotonic_s

    def death(self, phase: str) -> WorkerLostError:
        """How it has ended, or that its zygote has, and it with that."""
        if self.end() is None and not self._zygote.lives:
            message = f"{self._zygote.last_words()}, and the trial's process with it, during {phase}"
            return WorkerLostError("crashed", Failure(phase=phase, kind="ProcessDied", message=message))
        return super().death(phase)

    def end(self) -> int | None:
        """Close the connection, and kill the process and what it has started."""
        self.connection.close()
        if not self._ended:
            self._ended = True
            if self._zygote.lives:  # else the process has died with it, and its number may be another's
                kill_group(self.pid)
                self._code = self._zygote.reap(self.pid)
        return self._code
