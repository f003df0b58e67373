"""What both executors share: the machine, where the files of trials are, and the parent's end of a process."""

from __future__ import annotations

import abc
import contextlib
import os
import shutil
import signal
import time
from collections.abc import Collection, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lorameter import wire
from lorameter.errors import LorameterError, redact
from lorameter.machine import provenance
from lorameter.machine.cpus import cpus_of, pin_to_cpus
from lorameter.machine.processes import exit_words
from lorameter.machine.provenance import Machine, MachineFacts
from lorameter.records.record import Failure, PartialRecord
from lorameter.records.tempdirs import scratch_folder
from lorameter.run.workers import TrialFiles, WorkerLostError
from lorameter.run.workers.environment import Host, describe


class BaseExecutor:
    """The part of an `Executor` that describes the machine, and knows where the files of a run are: by absolute paths,
    since a host may run in another folder."""

    host: Host
    """Where its processes run."""
    folder: Path
    """Of the run."""
    logs: Path
    scratch: Path
    """For what is not kept."""
    threads: int
    """Of each measuring process."""
    _stack: contextlib.ExitStack | None = None

    def machine(self) -> Machine:
        """The present one, with the GPU that the host's processes see first."""
        return provenance.probe_machine(self.host.variables(os.environ))

    def free_bytes(self) -> int | None:
        """On that GPU, or in this container, now."""
        return provenance.free_bytes(self.machine(), self.host.variables(os.environ))

    def device_id(self) -> str:
        """The CPU, all of it, or the GPU that the host's processes see first, by its own number."""
        return provenance.device_id(self.host.variables(os.environ))

    def facts(self) -> MachineFacts:
        """Of the present machine and the GPU that the host's processes see first, and of the host if that is another.
        Raises `UsageError` if it does not answer."""
        host = None if self.host == Host() else describe(self.host)
        return provenance.read_facts(self.machine(), host, self.host.variables(os.environ))

    def start(self, folder: Path, threads: int) -> None:
        """Make the folders of a run; further processes compute with so many threads."""
        self.folder, self.threads = folder.resolve(), threads
        self.logs = self.folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self._stack = contextlib.ExitStack()
        self.scratch = self._stack.enter_context(scratch_folder())

    def make_place(self, trial: str, log: str) -> TrialFiles:
        """A temporary folder for a trial; the log lies with the run from the start."""
        scratch = self.scratch / trial
        scratch.mkdir(parents=True, exist_ok=True)
        return TrialFiles(scratch=str(scratch), log_path=str(self.logs / f"{log}.log"))

    def fetch(self, trial: str, name: str, folder: Path) -> Path:
        """Move a file of a trial; where it does not fit, no part of it is left."""
        try:
            return Path(shutil.move(self.scratch / trial / name, folder / name))
        except OSError:
            (folder / name).unlink(missing_ok=True)
            raise

    def clear_place(self, trial: str) -> None:
        """Remove the folder of a trial: adapters and compile caches of a long run would fill the disk."""
        shutil.rmtree(self.scratch / trial, ignore_errors=True)

    def close(self) -> None:
        """Remove what is not kept, and redact the logs."""
        if self._stack is not None:
            self._stack.close()
            self._stack = None
            redact_logs(self.logs)


def redact_logs(folder: Path) -> None:
    """Leave credentials out of logs. Processes write their logs themselves, so this is done when they have ended.

    A file is changed in place: a process of another executor may still have it open, and appends to it.
    """
    for path in sorted(folder.glob("*.log")):
        with contextlib.suppress(OSError), path.open("r+b") as file:
            text = file.read().decode(errors="surrogateescape")
            if (redacted := redact(text)) != text:
                file.seek(0)
                file.write(redacted.encode(errors="surrogateescape"))
                file.truncate()


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
        """CPUs that it may run on unless it is pinned; none where it is gone."""
        self._cpus = self._cpus or cpus_of(self.pid)
        return self._cpus

    def pin(self, cpus: Collection[int]) -> None:
        """Run on these of them only."""
        pin_to_cpus(self.pid, cpus)


def silence(phase: str, timeout_s: float) -> Failure:
    """The failure of a process that gave no answer in time."""
    message = f"no answer within {timeout_s:g} s during {phase}; it was killed. Raise step_timeout_s if it was at work"
    return Failure(phase=phase, kind="Silent", message=message)
