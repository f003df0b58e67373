"""`lorameter` with measuring processes that only pretend, so that a fault of the parent takes a second to inject.

    STOP_AT=r1-a:turn python pretended.py run study.toml ...

All else is real: the command line, the loop, the files, the locks, the signals. $STOP_AT names a trial and a command.
When that is asked, a line is written to the descriptor that $STOPPED names, and the process waits for whatever is done
to it; with USR1 it goes on. What stands after another colon is done by the process to itself instead: a signal's number
is sent, after "files" it can open no more of them, after "memory" it has next to none left, after "clock" that clock is
another by so many seconds (r1-a:turn:clock:-3600), and "full" is what a trial says whose disk is full.
"""

from __future__ import annotations

import contextlib
import errno
import io
import mmap
import os
import resource
import signal
import sys
import time
from pathlib import Path

import lorameter.run.workers.local as local
from lorameter.records.os_errors import failed_record
from lorameter.records.record import PartialRecord
from lorameter.run.workers import Executor
from tests.run.fakes import FakeExecutor

TRIAL, COMMAND, DEED, ARGUMENT = (*os.environ.get("STOP_AT", "-").split(":"), "", "", "")[:4]


STOPPED: list[str] = []
"""It waits once only: most commands come again."""


def stop(trial: str, command: str) -> None:
    """Wait for what comes, or do what was asked for."""
    if (trial, command) != (TRIAL, COMMAND):
        return
    if DEED:
        DEEDS.get(DEED, lambda: os.kill(os.getpid(), int(DEED)))()
        return
    if STOPPED:
        return
    STOPPED.append(command)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # it is kept until it is waited for
    os.write(int(os.environ["STOPPED"]), b"stopped\n")
    # With a timeout, since a signal that comes just before the wait begins does not end it: its Python handler would
    # run only after the wait.
    while signal.sigtimedwait({signal.SIGUSR1}, 0.1) is None:
        pass


def take_files() -> None:
    """No more of them can be opened."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len([*Path("/proc/self/fd").iterdir()]) - 1, most))


def take_memory() -> None:
    """No more can be had, and what the allocators still have of it is taken as well."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE, resource.RLIM_INFINITY))
    for size in (1 << 20, 1 << 16, 1 << 12, 500):
        try:
            while True:
                BALLAST.append(bytearray(size))
        except MemoryError:
            pass


def set_clock() -> None:
    """Change the wall clock; the monotonic clock cannot be set."""
    time.time = lambda: CALENDAR() + float(ARGUMENT)


def fill() -> None:
    """As a library says that it could not write: the system's words in an exception of its own."""
    raise RuntimeError(f"Error while serializing: I/O error: No space left on device (os error {errno.ENOSPC})")


CALENDAR = time.time
BALLAST: list[bytearray] = []
DEEDS = {"files": take_files, "memory": take_memory, "clock": set_clock, "full": fill}


class Pretended(FakeExecutor):
    """Every step takes the same time."""

    make_place, clear_place, close = Executor.make_place, Executor.clear_place, Executor.close

    def start(self, folder: Path, threads: int) -> None:
        Executor.start(self, folder, threads)
        stop("", "start")

    def launch(self) -> Worker:
        return Worker(self)

    def time_imports(self, log_path, timeout_s) -> PartialRecord:
        return PartialRecord(values={"cold_import_time_s": 1.0})

    def cold_start(self, request) -> PartialRecord:
        return PartialRecord(values={"cold_start_time_s": 2.0})


class Worker:
    """One process that is none."""

    start_latency_s = 0.01
    prefix = ""

    def __init__(self, executor: Pretended) -> None:
        self.executor = executor

    def cpus(self):
        return ()

    def ask(self, command, trial, timeout_s, **arguments) -> PartialRecord:
        try:
            stop(trial, command)
        except RuntimeError as error:
            with contextlib.redirect_stderr(io.StringIO()):  # a trial's own goes into its log
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

    local.LocalExecutor = Pretended
    sys.exit(main(sys.argv[1:]))
