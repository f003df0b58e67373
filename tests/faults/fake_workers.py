"""Runs `lorameter` with fake measuring processes, so that a fault of the parent is injected within a second.

    STOP_AT=r1-a:turn python fake_workers.py run study.toml ...

Everything else is real: the command line, the loop, the files, the locks, the signals. $STOP_AT names a trial and a
command. At that command the process writes a line to the descriptor in $STOPPED and waits for a signal; SIGUSR1 lets it
continue. With "full" after another colon the trial fails as on a full disk instead.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
from pathlib import Path

import lorameter.run.workers.local as local
from lorameter.records.os_errors import failed_record
from lorameter.records.record import PartialRecord
from lorameter.run.workers import Executor
from tests.run.fakes import FakeExecutor

TRIAL, COMMAND, FAULT = (*os.environ.get("STOP_AT", "-").split(":"), "", "")[:3]


STOPPED: list[str] = []
"""The command stops only once, since most commands occur several times."""


def stop(trial: str, command: str) -> None:
    """Wait for a signal or cause the requested fault at the given command."""
    if (trial, command) != (TRIAL, COMMAND):
        return
    if FAULT == "full":  # as a library reports it: the system's message in its own exception
        raise RuntimeError(f"Error while serializing: I/O error: No space left on device (os error {errno.ENOSPC})")
    if STOPPED:
        return
    STOPPED.append(command)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # the signal stays pending until the wait
    os.write(int(os.environ["STOPPED"]), b"stopped\n")
    # With a timeout, since a signal that comes just before the wait begins does not end it: its Python handler would
    # run only after the wait.
    while signal.sigtimedwait({signal.SIGUSR1}, 0.1) is None:
        pass


class InstantExecutor(FakeExecutor):
    """Every step takes the same time."""

    make_place, clear_place, close = Executor.make_place, Executor.clear_place, Executor.close

    def start(self, folder: Path, threads: int) -> None:
        Executor.start(self, folder, threads)
        stop("", "start")

    def launch(self) -> Worker:
        return Worker(self)

    def start_interpreter(self, log_path, timeout_s, request=None) -> PartialRecord:
        return PartialRecord(values={"cold_import_time_s": 1.0, "cold_start_time_s": 2.0})


class Worker:
    """A worker without a process."""

    start_latency_s = 0.01
    prefix = ""

    def __init__(self, executor: InstantExecutor) -> None:
        self.executor = executor

    def cpus(self):
        return ()

    def ask(self, command, trial, timeout_s, **arguments) -> PartialRecord:
        try:
            stop(trial, command)
        except RuntimeError as error:
            with contextlib.redirect_stderr(io.StringIO()):  # a trial writes to its log
                return failed_record(error, command)
        if command == "cold":
            return PartialRecord(values={"cold_after_import_time_s": 1.0})
        if command == "merge":
            self.prefix = "merged_"
        if command == "request":
            names = ("request_time_s", "first_token_time_s", "time_per_output_token_s")
            return PartialRecord(samples={self.prefix + name: (0.1,) for name in names})
        return self.executor.ask(command, trial, timeout_s, **arguments)

    def close(self) -> None:
        pass


if __name__ == "__main__":
    from lorameter.cli import main

    local.LocalExecutor = InstantExecutor
    sys.exit(main(sys.argv[1:]))
