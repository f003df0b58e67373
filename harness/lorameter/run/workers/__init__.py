"""Where trials run. `Executor` is the interface between the runner and processes: the runner knows no other.

An executor starts workers. A worker hosts one or more trials and answers one command at a time. The parent blocks on
the answer: nothing of the harness runs while a step is timed.

The facts of the machine, its free memory and the places of a trial's files come from the executor as well. To add one:
a module with a function `open_executor`, and a line in `EXECUTORS`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection
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
    from lorameter.run.workers.environment import Host

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


class Worker(Protocol):
    """One live process that hosts trials."""

    start_latency_s: float
    """From the request for the process to its first own instruction."""

    def ask(self, command: str, trial: str, timeout_s: float, **arguments: Any) -> PartialRecord:
        """Carry out a command. Raises `WorkerLostError` if the process dies or gives no answer within `timeout_s`."""

    def close(self) -> None:
        """End the process; one that has ended is no error."""


class AsyncWorker(Worker, Protocol):
    """A worker that can work at the same time as others: sending a command does not wait for the answer."""

    def send(self, command: str, trial: str, **arguments: Any) -> None:
        """Send a command without waiting for its answer."""

    def receive(self, command: str, timeout_s: float) -> PartialRecord:
        """The answer to the command that was sent, within `timeout_s` of sending. Raises `WorkerLostError` as `ask`."""


@runtime_checkable
class PinnableWorker(Worker, Protocol):
    """A worker whose CPUs can be chosen."""

    def cpus(self) -> tuple[int, ...]:
        """CPUs that it may run on unless it is pinned; none where it is gone."""

    def pin(self, cpus: Collection[int]) -> None:
        """Run on these of them only."""


class Executor(Protocol):
    """Starts workers in one interpreter on one machine. Before `start` it answers for the machine only."""

    def machine(self) -> Machine:
        """The machine as far as it can be known without touching its device."""

    def max_parallel(self, threads: int) -> int:
        """How many of its workers, with so many threads each, may work at once while nothing is timed; above one
        they are `AsyncWorker`s."""

    def device_id(self) -> str:
        """The measuring device: equal for two executors whose measurements would disturb each other."""

    def free_bytes(self) -> int | None:
        """Memory that processes could take there on the measuring device now; None where it cannot be known."""

    def facts(self) -> MachineFacts:
        """What the provenance of a run says of the machine and of what is installed there. Raises `UsageError`."""

    def start(self, folder: Path, threads: int) -> None:
        """Begin to get ready for a run; returns at once.

        Args:
            folder: of the run, on the parent's disk. When the executor is closed, it holds the tokens that are to be
                kept, and the logs of the trials in `logs`.
            threads: of each measuring process.
        """

    def hello(self) -> WorkerInfo:
        """Wait until ready; returns what the worker says of itself. Raises `InvalidRunError` if it does not start."""

    def prepare_tokens(self, workload: Workload, *, keep: bool = True) -> TokenSummary:
        """Make the token file of a workload; `keep` it with the run or let it go with the executor.

        Raises `UsageError` for data that cannot be read, `InvalidRunError` if it cannot be done.
        """

    def prepare_base(self, request: BaseRequest) -> BaseSummary:
        """Make or find the base that the trials of this executor will map. It stays in the cache for other runs.

        Raises `WorkerLostError` where it cannot be made (each trial then makes its own), `SystemLimitError` where the
        system refuses memory or disk for it, `InvalidRunError` if no process can be started.
        """

    def make_place(self, trial: str, log: str) -> TrialFiles:
        """Make a trial's folder; returns where its files lie. Trials of one process share one `log`."""

    def fetch(self, trial: str, name: str, folder: Path) -> Path:
        """Move a file of a trial's folder into a folder of the parent's disk; returns its path there."""

    def clear_place(self, trial: str) -> None:
        """Remove a trial's folder if it exists; its log stays."""

    def launch(self) -> Worker:
        """Start a process; it hosts the trials that it is asked to `prepare`. Raises `WorkerLostError`."""

    def cold_start(self, request: TrialRequest) -> PartialRecord:
        """Load the trial's saved adapter in a new interpreter and make a request. Raises `WorkerLostError`."""

    def time_imports(self, log_path: str, timeout_s: float) -> PartialRecord:
        """Time a new interpreter that imports what a cold start does. Raises `WorkerLostError`."""

    def close(self) -> None:
        """End everything that was started, and remove temporary files."""


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
