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
    send, spawn, ended = ForkedWorker.send, LocalExecutor._spawn, []

    def end(pid: int) -> None:
        ended.append(pid)
        os.kill(pid, int(number))

    def break_and_send(worker, command, asked, **arguments):
        if (asked, command) == (trial, phase) and not ended and target in ("child", "zygote"):
            end(worker.pid if target == "child" else psutil.Process(worker.pid).ppid())
            while _is_there(worker.pid):  # a zygote gives back a gigabyte before the kernel ends its children
                time.sleep(0.01)
        send(worker, command, asked, **arguments)

    def spawn_and_break(self, what, *arguments, **options):
        process = spawn(self, what, *arguments, **options)
        if what == target in ("cold", "tokens") and not ended:
            end(process.pid)
        return process

    ForkedWorker.send, LocalExecutor._spawn = break_and_send, spawn_and_break


def _is_there(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    from harness.cli import main

    arm()
    sys.exit(main(sys.argv[1:]))
