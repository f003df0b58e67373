"""Where trials run. `Executor` is the one seam of the harness: the runner knows nothing else of processes.

An executor starts workers, and a worker hosts one or more trials and answers one command at a time. The parent blocks
on the answer: nothing of the harness runs while a step is timed.
"""

from __future__ import annotations

from typing import Any, Protocol

from harness.records.record import Failure, Fragment, Status
from harness.studies.request import TrialRequest


class WorkerLostError(Exception):
    """A worker died or fell silent; `status` and `failure` are what becomes of its trials."""

    def __init__(self, status: Status, failure: Failure) -> None:
        super().__init__(failure.message)
        self.status: Status = status
        self.failure = failure


class Worker(Protocol):
    """One live process that hosts trials."""

    start_latency_s: float
    """From the request for the process to its first own instruction."""

    def ask(self, command: str, trial: str, timeout_s: float, **arguments: Any) -> Fragment:
        """Have one command carried out. Raises `WorkerLostError` when the process dies or is silent for `timeout_s`."""

    def close(self) -> None:
        """End the process. Never raises for a process that is gone already."""


class Executor(Protocol):
    """Starts workers on one interpreter and one machine."""

    def start(self) -> None:
        """Begin to get ready; returns at once."""

    def hello(self) -> dict[str, Any]:
        """Wait until ready; returns what the worker says of itself (`device`, `torch`, `import_time_s`)."""

    def launch(self) -> Worker:
        """A fresh process; it hosts the trials that it is asked to `prepare`. Raises `WorkerLostError`."""

    def cold_start(self, request: TrialRequest) -> Fragment:
        """Load and ask the trial's saved adapter in a new interpreter. Raises `WorkerLostError`."""

    def prepare_tokens(self, workload: Any, folder: str) -> dict[str, Any]:
        """Make the token file of a plan; returns the fields of a TokenSummary."""

    def close(self) -> None:
        """End everything that was started."""
