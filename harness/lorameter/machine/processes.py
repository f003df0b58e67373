"""Ends processes: the parent ends a worker that is silent, the zygote ends its children when it ends, and a
measuring process ends with its parent, however that ends.

The kernel ends a script with its parent, and not what a launcher has started in sessions of its own: `OrphanReaper`
does. It runs this module as a file, which imports the standard library alone.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

PARENT = "LORAMETER_PARENT"
"""The variable with the PID of the parent of a measuring process."""
CPUS = "LORAMETER_CPUS"
"""The variable with the numbers of the CPUs that a measuring process stays on; not set: any."""
FAULTS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
"""Signals that end a process for a fault of its own."""
_PR_SET_PDEATHSIG = 1


def kill_group(pid: int) -> None:
    """Kill a process and whatever it started (compile workers); it may not have become its group's leader yet."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def end_with_parent(parent: int) -> None:
    """From now on the kernel kills this process when `parent` ends, and now if it has ended already: between a fork
    and this call its end would go unnoticed."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def fork_process(run: Callable[[], object]) -> int:
    """Fork a process that calls `run` and ends with this one at the latest, without handlers that were registered for
    the end of this process. Returns its number. Raises OSError where the system refuses."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        end_with_parent(parent)
        run()
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def leave(code: int) -> NoReturn:
    """End this process without shutting its interpreter down: with torch, transformers and PEFT that takes a second
    (0.9 s measured), for which its parent would wait. What libraries have registered for the end is run, and
    what was printed is written; threads that still run are not waited for."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader is gone, or it is closed
            stream.flush()
    os._exit(code)


def outlive_parent() -> None:
    """Undo `end_with_parent`: this process detects the end of its parent by itself."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)


@contextlib.contextmanager
def held_back(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Delay these signals until the block has ended.

    What a signal's handler raises while Python forks is lost: it meets the functions that are called after a fork,
    whose errors are ignored. Blocking the signals would not do: in a process of several threads, as numpy makes one,
    another thread takes them, and their handlers run in the main one all the same. So they have another handler.
    """
    came: list[int] = []
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in signals:
            found = signal.getsignal(number)
            if found not in (signal.SIG_IGN, None):  # None: not from Python, and not to be put back by it
                before[number] = found
                signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        with contextlib.ExitStack() as stack:  # what the handler of one raises does not lose the others
            for arrived in reversed(came):
                stack.callback(signal.raise_signal, arrived)


def exit_words(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None:
        return "an unknown status"
    return f"exit code {code}" if code >= 0 else f"signal {-code} ({signal_name(-code)})"


def signal_name(number: int) -> str:
    """What a signal is called; real-time signals but the first and the last have no names."""
    return signal.Signals(number).name if number in set(signal.Signals) else "no name"


ATTEMPTS = 5
"""A process that starts during one search is found by the next."""


def marked(marker: bytes) -> list[int]:
    """Processes with this variable in the environment that they were started with."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                if marker in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found


def kill_marked(marker: bytes) -> None:
    """Kill them all, and what they start meanwhile."""
    for _ in range(ATTEMPTS):
        pids = marked(marker)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not pids:
            break


class OrphanReaper:
    """Kills what has a variable in its environment as soon as this process has ended: a process of its own waits for
    the end of a pipe, however that comes."""

    def __init__(self, marker: bytes) -> None:
        """Raises OSError where the system starts no process."""
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, marker.decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            start_new_session=True,  # what a terminal sends is not for it
        )

    def close(self) -> None:
        """There is nothing to be watched any more."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


def reap(marker: str) -> None:
    """Wait for the end of the parent, which closes standard input, and kill the marked processes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.read(0, 1)
    kill_marked(marker.encode())


if __name__ == "__main__":
    reap(sys.argv[1])
