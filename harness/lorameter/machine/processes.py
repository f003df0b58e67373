"""Ends processes, and pins them to CPUs.

The parent kills a worker that does not answer, the zygote kills its children when it ends, and a
measuring process ends with its parent in every case.

A script's launcher starts processes in new sessions, which no signal to the script reaches. `OrphanReaper` kills all
processes of a script when the parent ends. It runs this module as a file, which imports only the standard library.

CPUs of one machine differ in speed at any moment: another thread on the same core, of this machine or of another guest
on the host, slows a CPU down, and no counter of a virtual machine shows it. A process tends to stay on its CPU, so one
process would be slow throughout, while another on the next CPU would not. So processes whose times are compared run on
the same CPU.
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
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

PARENT = "LORAMETER_PARENT"
"""The variable with the PID of the parent of a measuring process."""
CPUS = "LORAMETER_CPUS"
"""The variable with the CPU numbers to which a measuring process is pinned; not set: any CPU."""
CRASH_SIGNALS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
"""Signals that report a crash of the process itself."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a program to end."""
_PR_SET_PDEATHSIG = 1


def kill_group(pid: int) -> None:
    """Kill a process and all processes that it started; it may not be the leader of its group yet."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def end_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when `parent` ends; exit now if it has already ended, because its end between
    the fork and this call would go unnoticed."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def fork_process(run: Callable[[], object]) -> int:
    """Fork a process that calls `run` and ends with this one at the latest; exit handlers of this process do not run in
    it. Returns its PID. Raises OSError if the system cannot fork."""
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


def exit_quickly(code: int) -> NoReturn:
    """End this process without shutting its interpreter down: with torch, transformers and PEFT that takes a second
    (0.9 s measured), for which its parent would wait. Exit handlers of libraries run, and output is flushed; running
    threads are not waited for."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the reader is gone, or the stream is closed
            stream.flush()
    os._exit(code)


def outlive_parent() -> None:
    """Undo `end_with_parent`: this process detects the end of its parent itself."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)


@contextlib.contextmanager
def handle_signals(
    signals: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], object]
) -> Iterator[None]:
    """Handle these signals with a handler inside the block. A signal that is ignored stays ignored.

    Python runs signal handlers in the main thread; in another thread this does nothing.
    """
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in signals:
            found = signal.getsignal(number)
            if found not in (signal.SIG_IGN, None):  # None: not set by Python, which cannot restore it
                before[number] = found
                signal.signal(number, handler)
    try:
        yield
    finally:
        for number, found in before.items():
            signal.signal(number, found)


def exit_words(code: int | None) -> str:
    """How a process ended, as text."""
    if code is None:
        return "an unknown status"
    names = {one.value: one.name for one in signal.Signals}  # most real-time signals have none
    return f"exit code {code}" if code >= 0 else f"signal {-code} ({names.get(-code, 'no name')})"


def explain_kill(code: int | None) -> str:
    """The probable causes of this exit status, to be appended to a message; empty unless it is SIGKILL."""
    return ": killed from outside, or by the kernel for lack of memory (see dmesg)" if code == -signal.SIGKILL else ""


ATTEMPTS = 5
"""Number of searches for marked processes; one that starts during a search is found by the next."""


def find_marked(marker: bytes) -> list[int]:
    """Processes whose initial environment contains this variable."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
                if marker in _read_environment(folder).split(b"\0"):
                    found.append(int(folder.name))
    return found


def _read_environment(folder: Path) -> bytes:
    """The initial environment of a process. Raises OSError for another user's process, a kernel thread and a process
    that has ended.

    At the end of execve(2) the environment is empty until its address is set: 2.5 % of the reads right after the start
    of a process on a busy machine. So it is read again until the end address, field 51 of proc_pid_stat(5), is set.
    """
    while True:
        complete = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[48] != "0"
        variables = (folder / "environ").read_bytes()
        if variables or complete:
            return variables
        (folder / "exe").readlink()  # a process without memory of its own has none


def kill_marked(marker: bytes) -> None:
    """Kill all of these processes, and those that they start meanwhile."""
    for _ in range(ATTEMPTS):
        pids = find_marked(marker)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not pids:
            break


class OrphanReaper:
    """Kills all processes with a certain environment variable as soon as this process has ended, for whatever reason: a
    separate process waits for the end of a pipe."""

    def __init__(self, marker: bytes) -> None:
        """Raises OSError if the system cannot start a process."""
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, marker.decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            start_new_session=True,  # so that it ignores signals from the terminal
        )

    def close(self) -> None:
        """Stop watching."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


def reap(marker: str) -> None:
    """Wait for the end of the parent, which closes standard input, and kill the marked processes."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.read(0, 1)
    kill_marked(marker.encode())


if __name__ == "__main__":
    reap(sys.argv[1])


def allowed_cpus(pid: int) -> tuple[int, ...]:
    """The CPUs on which a process may run, in order; empty if it has ended."""
    try:
        return tuple(sorted(os.sched_getaffinity(pid)))
    except OSError:
        return ()


def pin_to_cpus(pid: int, cpus: Collection[int]) -> None:
    """Restrict all threads of a process to these CPUs (sched_setaffinity(2)). Does nothing if the process has ended or
    this user may not change it."""
    with contextlib.suppress(OSError):
        for thread in list(Path(f"/proc/{pid}/task").iterdir()):
            with contextlib.suppress(OSError):  # a thread that has just ended
                os.sched_setaffinity(int(thread.name), cpus)


def has_children(pid: int) -> bool:
    """Whether a process has running children; True if unknown."""
    try:
        return any((thread / "children").read_text().strip() for thread in Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return True


def physical_cores(cpus: Iterable[int]) -> list[tuple[int, ...]]:
    """CPUs grouped by core, in the order of each core's first CPU. A CPU whose core is unknown forms its own group."""
    found: dict[str, list[int]] = {}
    for cpu in sorted(cpus):
        threads = f"of {cpu} alone"
        with contextlib.suppress(OSError):  # the list is the same for all threads of a core
            threads = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        found.setdefault(threads, []).append(cpu)
    return [tuple(threads) for threads in found.values()]
