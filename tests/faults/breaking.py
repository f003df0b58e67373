"""Started in place of the command line, or loaded by a session of pytest: everything is real, and one measuring process
gets a signal. `BREAK` says which, what and where: child, zygote, cold or tokens; its number; a trial and a phase."""

from __future__ import annotations

import os
import sys
import time

import psutil

from harness.run.executors.forked import ForkedWorker
from harness.run.executors.local import LocalExecutor


def arm() -> None:
    """Wait for the phase, and send the signal once."""
    target, number, trial, phase = os.environ["BREAK"].split(":")
    ask, spawn, sent = ForkedWorker.ask, LocalExecutor._spawn, []

    def send(pid: int) -> None:
        sent.append(pid)
        os.kill(pid, int(number))

    def ask_and_break(worker, command, asked, timeout_s, **arguments):
        if (asked, command) == (trial, phase) and not sent and target in ("child", "zygote"):
            send(worker.pid if target == "child" else psutil.Process(worker.pid).ppid())
            while _is_there(worker.pid):  # a zygote gives back a gigabyte before the kernel ends its children
                time.sleep(0.01)
        return ask(worker, command, asked, timeout_s, **arguments)

    def spawn_and_break(self, what, *arguments, **options):
        process = spawn(self, what, *arguments, **options)
        if what == target in ("cold", "tokens") and not sent:
            send(process.pid)
        return process

    ForkedWorker.ask, LocalExecutor._spawn = ask_and_break, spawn_and_break


def _is_there(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    from harness.cli import main

    arm()
    sys.exit(main(sys.argv[1:]))
