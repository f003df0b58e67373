"""A process that hosts trials and answers commands, as its parent sees it: at work, silent, or dead."""

from __future__ import annotations

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


class ProcessWorker:
    """Implements `Worker` over a connection; how its process is ended is up to what starts it."""

    start_latency_s = float("nan")
    pid = 0
    connection: Connection
    _sent_s = 0.0
    _cpus: tuple[int, ...] = ()
    """All that it may compute on, once they have been read."""

    def __init__(self, pid: int, connection: Connection) -> None:
        self.pid, self.connection = pid, connection

    def end(self) -> int | None:
        """Close the connection and kill the process; its exit status where it is known."""
        raise NotImplementedError

    def ask(self, command: str, trial: str, timeout_s: float, **arguments: Any) -> PartialRecord:
        """Send a command and block until its answer, the process's death, or `timeout_s`."""
        self.send(command, trial, **arguments)
        return self.receive(command, timeout_s)

    def send(self, command: str, trial: str, **arguments: Any) -> None:
        """Have it begin with a command; a process that is gone is found when its answer is received."""
        self._sent_s = time.monotonic()
        with contextlib.suppress(wire.ClosedError):
            wire.send(self.connection, wire.Command(command, trial, arguments))

    def receive(self, command: str, timeout_s: float) -> PartialRecord:
        """Its answer to the command that was sent, within `timeout_s` of that. Raises `WorkerLostError`."""
        left_s = timeout_s - (time.monotonic() - self._sent_s)
        with self.losses(command, timeout_s):
            return wire.receive_answer(self.connection, PartialRecord, left_s)

    @contextlib.contextmanager
    def losses(self, phase: str, timeout_s: float) -> Iterator[None]:
        """Within the block a message is received; where there is none the process is ended, and `WorkerLostError` says
        why."""
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
        """End the process, which keeps nothing that is needed."""
        self.end()

    def cpus(self) -> tuple[int, ...]:
        """All that it may compute on; none where it is gone."""
        self._cpus = self._cpus or cpus_of(self.pid)
        return self._cpus

    def sit(self, cpu: int) -> None:
        """Compute on one of them until it stands up."""
        pin_to_cpus(self.pid, {cpu})

    def stand(self) -> None:
        """Compute on any of them again."""
        pin_to_cpus(self.pid, self._cpus)

    def fileno(self) -> int:
        """Of the connection that its answer comes by."""
        return self.connection.fileno()


def silence(phase: str, timeout_s: float) -> Failure:
    """The failure of a process that gave no answer in time."""
    message = f"no answer within {timeout_s:g} s during {phase}; it was killed. Raise step_timeout_s if it was at work"
    return Failure(phase=phase, kind="Silent", message=message)
