"""The processes of trials. `Executor` is the only interface between the runner and processes.

An executor starts workers. A worker hosts one or more trials and answers one command at a time. The parent blocks on
the answer: nothing of the harness runs while a step is timed.

The facts of the machine, its free memory and the places of a trial's files come from the executor as well. To add one:
a module with a function `open_executor`, and a line in `EXECUTORS`.
"""

from __future__ import annotations

import abc
import contextlib
import importlib
import os
import shutil
import signal
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lorameter import wire
from lorameter.errors import LorameterError, UsageError, redact
from lorameter.machine import provenance
from lorameter.machine.cpus import cpus_of, pin_to_cpus
from lorameter.machine.processes import exit_words
from lorameter.machine.provenance import Machine, MachineFacts
from lorameter.records.record import Failure, PartialRecord, Status
from lorameter.records.tempdirs import scratch_folder
from lorameter.records.worker_info import BaseSummary, TokenSummary, WorkerInfo
from lorameter.run.workers.environment import Host, describe
from lorameter.studies.request import BaseRequest, TrialRequest
from lorameter.studies.workload import Workload

EXECUTORS = {"local": "lorameter.run.workers.local", "script": "lorameter.run.workers.script"}
"""The module of each executor, by its name."""
SCRIPTS = "script"
"""The executor of variants that are commands."""
ENV_EXECUTOR = "LORAMETER_EXECUTOR"


class WorkerLostError(Exception):
    """A worker died or did not answer; `status` and `failure` go into the records of its trials."""

    def __init__(self, status: Status, failure: Failure) -> None:
        super().__init__(failure.message)
        self.status: Status = status
        self.failure = failure


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialFiles:
    """Paths of a trial's files, absolute, on the machine that measures it."""

    scratch: str
    """Its folder: saved adapter, compile caches."""
    log_path: str
    """Output of its process."""


class Worker(abc.ABC):
    """One live process that hosts trials, reached over a connection; a subclass starts the process and ends it."""

    start_latency_s = float("nan")
    """From the request for the process to its first own instruction."""
    pid = 0
    connection: Connection
    _sent_s = 0.0
    _cpus: tuple[int, ...] = ()
    """CPUs that it may run on, once they have been read."""

    @abc.abstractmethod
    def end(self) -> int | None:
        """Close the connection and kill the process; its exit status where it is known."""

    def ask(self, command: str, trial: str, timeout_s: float, **arguments: Any) -> PartialRecord:
        """Carry out a command. Raises `WorkerLostError` if the process dies or gives no answer within `timeout_s`."""
        self.send(command, trial, **arguments)
        return self.receive(command, timeout_s)

    def send(self, command: str, trial: str, **arguments: Any) -> None:
        """Send a command without waiting for its answer; `receive` raises for a process that has ended."""
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
        """The error for a process that has closed its connection."""
        code = self.end()
        message = f"the trial's process ended with {exit_words(code)} during {phase}"
        if code == -signal.SIGKILL:
            message += ": killed from outside, or by the kernel for want of memory (see dmesg)"
        return WorkerLostError("crashed", Failure(phase=phase, kind="ProcessDied", message=message))

    def close(self) -> None:
        """End the process; one that has ended is no error."""
        self.end()

    def cpus(self) -> tuple[int, ...]:
        """CPUs that it may run on unless it is pinned; none if it has ended."""
        self._cpus = self._cpus or cpus_of(self.pid)
        return self._cpus

    def pin(self, cpus: Collection[int]) -> None:
        """Run on these of them only."""
        pin_to_cpus(self.pid, cpus)


def silence(phase: str, timeout_s: float) -> Failure:
    """The failure of a process that gave no answer in time."""
    message = f"no answer within {timeout_s:g} s during {phase}; it was killed. Raise step_timeout_s if it was at work"
    return Failure(phase=phase, kind="Silent", message=message)


class Executor(abc.ABC):
    """Starts workers in one interpreter on this machine. Before `start` it answers for the machine only.

    It knows where the files of a run are by absolute paths, since a host may run in another folder.

    A method that raises `NotImplementedError` is an operation that not every executor has: scripts have no bases and no
    cold starts, a simulation has no tokens. No plan asks for what its executor does not have.
    """

    host: Host
    """The interpreter and environment of its processes."""
    folder: Path
    """The folder of the run."""
    logs: Path
    scratch: Path
    """For temporary files."""
    threads: int
    """CPU threads of each measuring process."""
    _stack: contextlib.ExitStack | None = None

    def machine(self) -> Machine:
        """The machine as far as it can be known without touching its device, with the GPU that the host's processes see
        first."""
        return provenance.probe_machine(self.host.variables(os.environ))

    def free_bytes(self) -> int | None:
        """Memory that processes could take on that GPU, or in this container, now; None where it cannot be known."""
        return provenance.free_bytes(self.machine(), self.host.variables(os.environ))

    def device_id(self) -> str:
        """The CPU, all of it, or the GPU that the host's processes see first, by its own number: equal for two
        executors whose measurements would disturb each other."""
        return provenance.device_id(self.host.variables(os.environ))

    def facts(self) -> MachineFacts:
        """The provenance of the machine and of the packages in the host. Raises `UsageError` if
        the host does not answer."""
        host = None if self.host == Host() else describe(self.host)
        return provenance.read_facts(self.machine(), host, self.host.variables(os.environ))

    def max_parallel(self, threads: int) -> int:
        """The number of its workers, with so many threads each, that may work at once while nothing is timed."""
        raise NotImplementedError

    def start(self, folder: Path, threads: int) -> None:
        """Begin to get ready for a run; returns at once.

        Args:
            folder: of the run, on the parent's disk. When the executor is closed, it holds the tokens that are to be
                kept, and the logs of the trials in `logs`.
            threads: of each measuring process.
        """
        self.folder, self.threads = folder.resolve(), threads
        self.logs = self.folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self._stack = contextlib.ExitStack()
        self.scratch = self._stack.enter_context(scratch_folder())

    def hello(self) -> WorkerInfo:
        """Wait until ready; returns what the worker says of itself. Raises `InvalidRunError` if it does not start."""
        raise NotImplementedError

    def prepare_tokens(self, workload: Workload, *, keep: bool = True) -> TokenSummary:
        """Make the token file of a workload; `keep` it with the run or let it go with the executor.

        Raises `UsageError` for data that cannot be read, `InvalidRunError` if it cannot be done.
        """
        raise NotImplementedError

    def prepare_base(self, request: BaseRequest) -> BaseSummary:
        """Make or find the base that the trials of this executor will map. It stays in the cache for other runs.

        Raises `WorkerLostError` where it cannot be made (each trial then makes its own), `SystemLimitError` where the
        system refuses memory or disk for it, `InvalidRunError` if no process can be started.
        """
        raise NotImplementedError

    def make_place(self, trial: str, log: str) -> TrialFiles:
        """Make a trial's temporary folder; its log lies with the run. Trials of one process share one `log`."""
        scratch = self.scratch / trial
        scratch.mkdir(parents=True, exist_ok=True)
        return TrialFiles(scratch=str(scratch), log_path=str(self.logs / f"{log}.log"))

    def fetch(self, trial: str, name: str, folder: Path) -> Path:
        """Move a file of a trial's folder into another; returns its path there. Where it does not fit, no part of it is
        left."""
        try:
            return Path(shutil.move(self.scratch / trial / name, folder / name))
        except OSError:
            (folder / name).unlink(missing_ok=True)
            raise

    def clear_place(self, trial: str) -> None:
        """Remove a trial's folder if it exists: adapters and compile caches of a long run would fill the disk."""
        shutil.rmtree(self.scratch / trial, ignore_errors=True)

    @abc.abstractmethod
    def launch(self) -> Worker:
        """Start a process; it hosts the trials that it is asked to `prepare`. Raises `WorkerLostError`."""

    def cold_start(self, request: TrialRequest) -> PartialRecord:
        """Load the trial's saved adapter in a new interpreter and make a request. Raises `WorkerLostError`."""
        raise NotImplementedError

    def time_imports(self, log_path: str, timeout_s: float) -> PartialRecord:
        """Time a new interpreter that imports what a cold start does. Raises `WorkerLostError`."""
        raise NotImplementedError

    def close(self) -> None:
        """End everything that was started, remove temporary files, and redact the logs."""
        if self._stack is not None:
            self._stack.close()
            self._stack = None
            _redact_logs(self.logs)


def _redact_logs(folder: Path) -> None:
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


def open_executor(name: str | None = None, *, host: Host | None = None, label: str = "") -> Executor:
    """An executor by its name; nothing is started yet.

    Args:
        name: one of `EXECUTORS`; None for the one that the environment names ($LORAMETER_EXECUTOR), else "local".
        host: the interpreter that trials run in; None for the one that the executor's machine has for it.
        label: names the side of an A/B in messages and in the names of logs.

    Raises:
        UsageError: no executor of that name.
    """
    name = name or os.environ.get(ENV_EXECUTOR) or "local"
    if name not in EXECUTORS:
        raise UsageError(f"executor {name!r}: not known. Use one of {', '.join(EXECUTORS)}.")
    made: Executor = importlib.import_module(EXECUTORS[name]).open_executor(host=host, label=label)
    return made
