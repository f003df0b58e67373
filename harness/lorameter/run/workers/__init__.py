"""The processes of trials. `Executor` is the only interface between the runner and processes.

An executor starts workers. A worker hosts one or more trials and answers one command at a time. The parent blocks on
the answer: the harness does not run while a step is timed.

The executor also provides the facts about the machine, its free memory and the paths of a trial's files. To add an
executor, write a class and add a line to `EXECUTORS`. The device of an executor is locked while it measures
(`hold_devices`).
"""

from __future__ import annotations

import abc
import contextlib
import fcntl
import os
import pkgutil
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from lorameter import wire
from lorameter.errors import InvalidRunError, LorameterError, redact, require
from lorameter.machine import provenance
from lorameter.machine.processes import allowed_cpus, exit_words, explain_kill, pin_to_cpus
from lorameter.machine.products import add_products
from lorameter.machine.provenance import Machine, MachineFacts
from lorameter.records.fileio import scratch_folder
from lorameter.records.record import BaseSummary, Failure, Notice, PartialRecord, Status, TokenSummary, WorkerInfo
from lorameter.run.workers.environment import Host, describe
from lorameter.studies.form import AnyVariant
from lorameter.studies.request import BaseRequest, Request
from lorameter.studies.workload import Workload
from lorameter.terminal import print_stderr

EXECUTORS = {
    "local": "lorameter.run.workers.local:LocalExecutor",
    "script": "lorameter.run.workers.script:ScriptExecutor",
}
"""The class of each executor, by name. A form of another package names its own as MODULE:CLASS."""
MAX_OUTPUT = 8000
"""Maximum characters of a process's output before its death that a record keeps; the log has all."""


class WorkerLostError(Exception):
    """Raised if a worker died or did not answer; `status` and `failure` go into the records of its trials."""

    def __init__(self, status: Status, failure: Failure) -> None:
        super().__init__(failure.message)
        self.status: Status = status
        self.failure = failure


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialFiles:
    """Absolute paths of a trial's files, on the machine that measures it."""

    scratch: str
    """Its folder: saved adapter, compile caches."""
    log_path: str
    """Output of its process."""


class Worker(abc.ABC):
    """One live process that hosts trials, connected to the parent; subclasses start and end the process."""

    start_latency_s = float("nan")
    """Seconds from the request for the process to its first instruction."""
    pid = 0
    connection: Connection
    _cpus: tuple[int, ...] = ()
    """CPUs on which it may run, after they have been read."""

    @abc.abstractmethod
    def close(self) -> int | None:
        """End the process if it has not ended, and close the connection; returns its exit status if known."""

    def ask(self, command: str, trial: str, timeout_s: float, **arguments: Any) -> PartialRecord:
        """Execute a command. Raises `WorkerLostError` if the process dies or does not answer within `timeout_s`."""
        self.send(command, trial, **arguments)
        return self.receive(command, timeout_s)

    def send(self, command: str, trial: str, **arguments: Any) -> None:
        """Send a command without waiting for its answer; if the process has ended, `receive` raises."""
        with contextlib.suppress(wire.ClosedError):
            wire.send(self.connection, wire.Command(command, trial, arguments))

    def receive(self, command: str, timeout_s: float) -> PartialRecord:
        """The answer to the command that was sent, which must arrive within `timeout_s`. Raises `WorkerLostError`."""
        with self.handle_loss(command, timeout_s):
            return wire.receive_answer(self.connection, PartialRecord, timeout_s)

    @contextlib.contextmanager
    def handle_loss(self, phase: str, timeout_s: float) -> Iterator[None]:
        """If the block receives no message, end the process and raise `WorkerLostError` with the reason."""
        try:
            yield
        except TimeoutError:
            self.close()
            raise timeout_error(phase, timeout_s) from None
        except wire.ClosedError:
            raise self.death_error(phase) from None
        except (wire.GarbledError, LorameterError) as error:
            self.close()
            message = f"the trial's process gave an unreadable answer, and was killed: {error}"
            raise WorkerLostError("crashed", Failure(phase=phase, kind="Garbled", message=message)) from None

    def death_error(self, phase: str) -> WorkerLostError:
        """The error for a process that has closed its connection."""
        code = self.close()
        message = f"the trial's process ended with {exit_words(code)} during {phase}{explain_kill(code)}"
        return WorkerLostError("crashed", Failure(phase=phase, kind="ProcessDied", message=message))

    def cpus(self) -> tuple[int, ...]:
        """CPUs on which it may run if it is not pinned; empty if it has ended."""
        if self.pid:  # 0 would be the current process
            self._cpus = self._cpus or allowed_cpus(self.pid)
        return self._cpus

    def pin(self, cpus: Collection[int]) -> None:
        """Restrict the process to these CPUs."""
        pin_to_cpus(self.pid, cpus)


def timeout_error(phase: str, timeout_s: float) -> WorkerLostError:
    """The error for a process that gave no answer in time."""
    message = f"no answer within {timeout_s:g} s during {phase}; it was killed. Raise step_timeout_s if it still worked"
    return WorkerLostError("timeout", Failure(phase=phase, kind="Silent", message=message))


class Executor(abc.ABC):
    """Starts workers in one interpreter on this machine. Before `start`, it only answers questions about the machine.

    It uses absolute paths for the files of a run, since a host may run in another folder.

    Methods that raise `NotImplementedError` are optional: scripts have no tokens, bases and cold starts. A plan never
    uses an operation that the form of its variants does not support.
    """

    host: Host
    """The interpreter and environment of its processes."""
    folder: Path
    """The folder of the run."""
    logs: Path
    scratch: Path
    """Folder for temporary files."""
    threads: int
    """CPU threads of each measuring process."""
    _stack: contextlib.ExitStack | None = None

    def machine(self) -> Machine:
        """The machine, as far as it can be described without using its device, with the first GPU that the host's
        processes see, or the rates of a CPU's products."""
        return add_products(provenance.probe_machine(self.host.variables(os.environ)))

    def free_bytes(self) -> int | None:
        """Memory available now to processes on that GPU, or in this container; None if unknown."""
        return provenance.free_bytes(self.machine(), self.host.variables(os.environ))

    def device_id(self) -> str:
        """Id of the CPU (as a whole), or of the first GPU that the host's processes see: equal for two executors whose
        measurements would disturb each other."""
        return provenance.device_id(self.host.variables(os.environ))

    def facts(self) -> MachineFacts:
        """The provenance of the machine and of the packages in the host. Raises `UsageError` if the host does not
        answer."""
        host = None if self.host == Host() else describe(self.host)
        return provenance.read_facts(self.machine(), host, self.host.variables(os.environ))

    def max_parallel(self, threads: int) -> int:
        """The number of workers, with this many threads each, that may run at once while nothing is timed; one if the
        number of threads that a worker needs is unknown, as of a script."""
        return 1

    def check_variants(self, variants: Iterable[AnyVariant]) -> tuple[Notice, ...]:
        """Notices about variants that lorameter does not build, before anything is started. Raises `UsageError` for a
        variant that cannot be measured."""
        return ()

    def start(self, folder: Path, threads: int) -> None:
        """Begin to prepare for a run; returns at once.

        Args:
            folder: folder of the run, on the parent's disk. When the executor is closed, it contains the kept tokens,
                and the logs of the trials in `logs`.
            threads: CPU threads of each measuring process.
        """
        self.folder, self.threads = folder.resolve(), threads
        self.logs = self.folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self._stack = contextlib.ExitStack()
        self.scratch = self._stack.enter_context(scratch_folder())

    def hello(self) -> WorkerInfo:
        """Wait until ready; returns the worker's description of itself. Raises `InvalidRunError` if it does not
        start."""
        raise NotImplementedError

    def prepare_tokens(self, workload: Workload, *, keep: bool = True) -> TokenSummary:
        """Make the token file of a workload; with `keep` it stays with the run, else it is removed with the executor.

        Raises `UsageError` if the data cannot be read, `InvalidRunError` for any other failure.
        """
        raise NotImplementedError

    def prepare_base(self, request: BaseRequest) -> BaseSummary:
        """Make the base that the trials of this executor will map, or find it in the cache. It stays in the cache for
        other runs.

        Raises `WorkerLostError` if it cannot be made (each trial then makes its own), `SystemLimitError` if there is
        not enough memory or disk space for it, `InvalidRunError` if no process can be started.
        """
        raise NotImplementedError

    def make_place(self, trial: str, log: str) -> TrialFiles:
        """Make a trial's temporary folder; its log is in the run's folder. Trials of one process share one `log`."""
        scratch = self.scratch / trial
        scratch.mkdir(parents=True, exist_ok=True)
        return TrialFiles(scratch=str(scratch), log_path=str(self.logs / f"{log}.log"))

    def fetch(self, trial: str, name: str, folder: Path) -> Path:
        """Move a file from a trial's folder into another folder; returns its new path. If it does not fit, nothing
        remains there."""
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
        """Start a process; it hosts the trials that it receives by `prepare`. Raises `WorkerLostError`."""

    def start_interpreter(self, log_path: str, timeout_s: float, request: Request | None = None) -> PartialRecord:
        """Time the imports of a cold start in a new interpreter; with a `request`, it also loads the trial's saved
        adapter and answers. Raises `WorkerLostError`."""
        raise NotImplementedError

    def close(self) -> None:
        """End all processes that were started, remove temporary files, and redact the logs."""
        if self._stack is not None:
            self._stack.close()
            self._stack = None
            _redact_logs(self.logs)


def _redact_logs(folder: Path) -> None:
    """Remove credentials from logs. Processes write their logs themselves, so this happens after they have ended.

    Files are changed in place, because a process of another executor may still append to an open one.
    """
    for path in sorted(folder.glob("*.log")):
        with contextlib.suppress(OSError), path.open("r+b") as file:
            text = file.read().decode(errors="surrogateescape")
            if (redacted := redact(text)) != text:
                file.seek(0)
                file.write(redacted.encode(errors="surrogateescape"))
                file.truncate()


def open_executor(name: str = "local", *, host: Host | None = None, label: str = "") -> Executor:
    """Open an executor by its name; nothing is started yet.

    Args:
        name: one of `EXECUTORS`, or MODULE:CLASS; $LORAMETER_EXECUTOR replaces "local".
        host: the interpreter of the trials; None for the default one of the executor's machine.
        label: names the side of an A/B in messages and log names.

    Raises:
        UsageError: there is no executor of that name.
    """
    if name == "local":
        name = os.environ.get("LORAMETER_EXECUTOR") or name
    require(name in EXECUTORS or ":" in name, f"executor {name!r}: not known. Use one of {', '.join(EXECUTORS)}.")
    made: Executor = pkgutil.resolve_name(EXECUTORS.get(name, name))(host=host, label=label)
    return made


# --- the lock of a device ---------------------------------------------------------------------------------------------
#
# A device is locked for one measurement at a time, because two would disturb each other. The lock is a kernel lock
# (flock) on a file named after the device. So it ends with the process that holds it, and waiting for it takes no CPU
# time. The file is in a folder shared by all users, and is never removed: otherwise two processes could lock two files
# of the same name.

IfBusy = Literal["wait", "refuse", "share"]
"""The action if the device is in use: wait for the end of the other measurement · exit · measure at the same time."""
ENV_LOCKS = "LORAMETER_LOCKS"
SHARED_FOLDER = Path("/tmp")
"""The same folder for all users and jobs, whatever their TMPDIR is."""


@contextlib.contextmanager
def hold_devices(executors: Iterable[Executor], if_busy: IfBusy) -> Iterator[bool]:
    """Lock the executors' devices inside the block. Yields whether it waited for another measurement, since free memory
    may have changed. On a file system without locks, nothing is locked.

    Each device is locked once, and always in the same order, so that two processes cannot deadlock.

    Args:
        executors: executors of the devices.
        if_busy: what to do if a device is in use; "share" takes no lock.

    Raises:
        InvalidRunError: a device is in use, and `if_busy` is "refuse".
    """
    waited = False
    devices = {executor.device_id() for executor in executors if if_busy != "share"}
    with contextlib.ExitStack() as stack:
        for device in sorted(devices):
            file = _open(device)
            if file is None:
                continue
            stack.callback(os.close, file)
            if _lock(file, wait=False):
                continue
            who = f"{_holder(file)} measures on this device ({device})"
            if if_busy == "refuse":
                raise InvalidRunError(f"{who}. Wait for it, or measure at the same time with --if-busy share.")
            print_stderr(
                f"{who}; waiting for its end. --if-busy refuse ends instead, --if-busy share measures at the same time."
            )
            waited = _lock(file, wait=True)
        yield waited


def _open(device: str) -> int | None:
    """The lock file of a device, which may belong to another user; None if it cannot be made."""
    name = f"lorameter-{re.sub(r'[^A-Za-z0-9-]+', '-', device)}.lock"
    path = Path(os.environ.get(ENV_LOCKS) or SHARED_FOLDER) / name
    common_flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe would block until something writes into it
    for flags in (os.O_RDONLY, os.O_RDONLY | os.O_CREAT | os.O_EXCL, os.O_RDONLY):  # another process may create it
        with contextlib.suppress(OSError):
            return os.open(path, flags | common_flags, 0o644)
    return None


def _lock(file: int, *, wait: bool) -> bool:
    """Whether the lock was taken; a file system without locks delays no measurement."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _holder(file: int) -> str:
    """The process that holds the lock, from the kernel's list; a process of another container has no PID here."""
    inode = os.fstat(file).st_ino
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            match = re.match(rf"\d+: FLOCK +ADVISORY +WRITE +(\d+) [0-9a-f]+:[0-9a-f]+:{inode} ", line)
            if match and match[1] != "0":
                return f"process {match[1]}"
    return "another process"
