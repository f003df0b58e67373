"""The parent's end of a process that hosts trials and answers commands: it asks, and names how a process is lost."""

from __future__ import annotations

import abc
import contextlib
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from lorameter import wire
from lorameter.errors import LorameterError
from lorameter.machine.affinity import cpus_of, pin_to_cpus
from lorameter.machine.processes import exit_words
from lorameter.records.record import Failure, PartialRecord
from lorameter.run.executors import WorkerLostError


class ProcessWorker(abc.ABC):
    """Implements `Worker` over a connection; a subclass starts the process and ends it."""

    start_latency_s = float("nan")
    pid = 0
    connection: Connection
    _sent_s = 0.0
    _cpus: tuple[int, ...] = ()
    """CPUs that it may run on, once they have been read."""

    def __init__(self, pid: int, connection: Connection) -> None:
        self.pid, self.connection = pid, connection

    @abc.abstractmethod
    def end(self) -> int | None:
        """Close the connection and kill the process; its exit status where it is known."""

    def ask(self, command: str, trial: str, timeout_s: float, **arguments: Any) -> PartialRecord:
        """Send a command and block until its answer, the process's death, or `timeout_s`."""
        self.send(command, trial, **arguments)
        return self.receive(command, timeout_s)

    def send(self, command: str, trial: str, **arguments: Any) -> None:
        """Send a command without waiting for its answer; `receive` finds a process that is gone."""
        self._sent_s = time.monotonic()
        with contextlib.suppress(wire.ClosedError):
            wire.send(self.connection, wire.Command(command, trial, arguments))

    def receive(self, command: str, timeout_s: float) -> PartialRecord:
        """The answer to the command that was sent, within `timeout_s` of sending. Raises `WorkerLostError`."""
        left_s = timeout_s - (time.monotonic() - self._sent_s)
        with self.losses(command, timeout_s):
            return wire.receive_answer(self.connection, PartialRecord, left_s)

    @contextlib.contextmanager
    def losses(self, phase: str, timeout_s: float) -> Iterator[None]:
        """Raise `WorkerLostError` with the reason where the block receives no message, and end the process."""
        try:
            yield
        except TimeoutError:
            self.end()
            raise WorkerLostError("timeout", silence(phase, timeout_s)) from None
        except wire.ClosedError:
            raise self.death(phase) from None
        except (wire.GarbledError, LorameterError) as error:
            self.end()
            message = f"the trial's process gave no answer that can be read, and was killed: {error}"
            raise WorkerLostError("crashed", Failure(phase=phase, kind="Garbled", message=message)) from None

    def death(self, phase: str) -> WorkerLostError:
        """How a process that closed its connection has ended."""
        code = self.end()
        message = f"the trial's process ended with {exit_words(code)} during {phase}"
        if code == -signal.SIGKILL:
            message += ": killed from outside, or by the kernel for want of memory (see dmesg)"
        return WorkerLostError("crashed", Failure(phase=phase, kind="ProcessDied", message=message))

    def close(self) -> None:
        """End the process."""
        self.end()

    def cpus(self) -> tuple[int, ...]:
        """CPUs that it may run on; none where it is gone."""
        self._cpus = self._cpus or cpus_of(self.pid)
        return self._cpus

    def pin(self, cpu: int) -> None:
        """Run on one of them until `unpin`."""
        pin_to_cpus(self.pid, {cpu})

    def unpin(self) -> None:
        """Run on any of them again."""
        pin_to_cpus(self.pid, self._cpus)


def silence(phase: str, timeout_s: float) -> Failure:
    """The failure of a process that gave no answer in time."""
    message = f"no answer within {timeout_s:g} s during {phase}; it was killed. Raise step_timeout_s if it was at work"
    return Failure(phase=phase, kind="Silent", message=message)
