"""Where trials run. `Executor` is the one seam of the harness: the runner knows nothing else of processes.

An executor starts workers, and a worker hosts one or more trials and answers one command at a time. The parent blocks
on the answer: nothing of the harness runs while a step is timed.

It answers for its machine and its disk as well. What the manifest says of the machine, how much memory is free and
where a trial's files lie is asked of the executor and never of the machine that the parent happens to be on. To add
one: a module with a function `open_executor`, and a line in `EXECUTORS`.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lorameter.errors import UsageError
from lorameter.machine.provenance import Machine, MachineFacts
from lorameter.records.record import Failure, PartialRecord, Status
from lorameter.records.worker_info import BaseSummary, TokenSummary, WorkerInfo
from lorameter.studies.request import BaseRequest, TrialRequest
from lorameter.studies.workload import Workload

if TYPE_CHECKING:
    from lorameter.run.executors.host import Host

EXECUTORS = {"local": "lorameter.run.executors.local", "script": "lorameter.run.executors.script"}
"""The module of each executor, by its name."""
SCRIPTS = "script"
"""The one for variants that are commands."""
ENV_EXECUTOR = "LORAMETER_EXECUTOR"


class WorkerLostError(Exception):
    """A worker died or fell silent; `status` and `failure` are what becomes of its trials."""

    def __init__(self, status: Status, failure: Failure) -> None:
        super().__init__(failure.message)
        self.status: Status = status
        self.failure = failure


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialFiles:
    """Where the files of a trial lie: absolute paths on the machine that measures it."""

    scratch: str
    """Its folder: saved adapter, compile caches."""
    log_path: str
    """What its process prints."""


class Worker(Protocol):
    """One live process that hosts trials."""

    start_latency_s: float
    """From the request for the process to its first own instruction."""

    def ask(self, command: str, trial: str, timeout_s: float, **arguments: Any) -> PartialRecord:
        """Have one command carried out. Raises `WorkerLostError` when the process dies or is silent for `timeout_s`."""

    def close(self) -> None:
        """End the process. Never raises for a process that is gone already."""


class AsyncWorker(Worker, Protocol):
    """One that can be at work beside others: it is asked in two halves."""

    def send(self, command: str, trial: str, **arguments: Any) -> None:
        """Have it begin with a command, and wait for nothing."""

    def receive(self, command: str, timeout_s: float) -> PartialRecord:
        """Its answer to what was sent, within `timeout_s` of that. Raises `WorkerLostError` as `ask` does."""

    def fileno(self) -> int:
        """What can be read when it has answered, or has died."""


@runtime_checkable
class PinnableWorker(Worker, Protocol):
    """One that can be told on which of its CPUs to compute."""

    def cpus(self) -> tuple[int, ...]:
        """All that it may compute on; none where it is gone."""

    def sit(self, cpu: int) -> None:
        """Compute on one of them until it stands up."""

    def stand(self) -> None:
        """Compute on any of them again."""


class Executor(Protocol):
    """Starts workers in one interpreter on one machine. Before `start` it answers for the machine only."""

    def machine(self) -> Machine:
        """The machine as far as it can be known without touching its device."""

    def lanes(self, threads: int) -> int:
        """How many of its workers, of so many threads each, may be at work at once where nothing is timed; above one
        they are `AsyncWorker`s."""

    def device_id(self) -> str:
        """What is measured on: the same for two executors whose measurements would disturb each other."""

    def free_bytes(self) -> int | None:
        """Memory that processes could take there on the measuring device now; None where it cannot be known."""

    def facts(self) -> MachineFacts:
        """What the provenance of a run says of the machine and of what is installed there. Raises `UsageError`."""

    def start(self, folder: Path, threads: int) -> None:
        """Begin to get ready for a run; returns at once.

        Args:
            folder: of the run, on the parent's disk. When the executor is closed, the logs of its trials lie in `logs`
                in it, and the tokens that are to be kept beside that.
            threads: of each measuring process.
        """

    def hello(self) -> WorkerInfo:
        """Wait until ready; returns what the worker says of itself. Raises `InvalidRunError` if it does not start."""

    def prepare_tokens(self, workload: Workload, *, keep: bool = True) -> TokenSummary:
        """Make the token file of a workload; `keep` it with the run or let it go with the executor.

        Raises `UsageError` for data that cannot be read, `InvalidRunError` if it cannot be done.
        """

    def prepare_base(self, request: BaseRequest) -> BaseSummary:
        """Have a base made, or found, that the trials of this executor will map; it is kept for other runs as well, and
        held for this one until the executor is closed.

        Raises `WorkerLostError` where it cannot be made (trials then make theirs themselves), `RefusedError` where the
        system refuses what it takes, `InvalidRunError` if no process can be started.
        """

    def make_place(self, trial: str, log: str) -> TrialFiles:
        """Make a trial's folder, and say where its files lie. Trials of one process print into one `log`."""

    def fetch(self, trial: str, name: str, folder: Path) -> Path:
        """Bring a file of a trial's folder into one of the parent's disk; returns its path there."""

    def clear_place(self, trial: str) -> None:
        """Remove a trial's folder with all that it holds, if there is one; its log stays."""

    def launch(self) -> Worker:
        """A fresh process; it hosts the trials that it is asked to `prepare`. Raises `WorkerLostError`."""

    def cold_start(self, request: TrialRequest) -> PartialRecord:
        """Load and ask the trial's saved adapter in a new interpreter. Raises `WorkerLostError`."""

    def time_imports(self, log_path: str, timeout_s: float) -> PartialRecord:
        """Time a new interpreter that imports what a cold start does. Raises `WorkerLostError`."""

    def close(self) -> None:
        """End everything that was started, and remove what was not to be kept."""


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
