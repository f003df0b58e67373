"""A script's process and all that it starts, as its parent sees them: started, connected, dead, ended.

A launcher starts others in sessions of their own, so the group of the first process is not all. Every process that
belongs to the trial has the name of its socket in its environment, and that is what they are found by at the end.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

from lorameter.attach.launch import HOOKED, SOCKET, address, read_missing_packages
from lorameter.errors import redact
from lorameter.machine.orphan_reaper import OrphanReaper, kill_marked, marked
from lorameter.machine.processes import end_with_parent, exit_words, held_back, kill_group
from lorameter.records.os_errors import says_out_of_memory
from lorameter.records.record import Failure, Status
from lorameter.run.interrupts import SIGNALS
from lorameter.run.workers import WorkerLostError

POLL_S = 0.05
"""How often a process that has not connected yet is looked at: it is loading, and nothing is timed."""
END_TIMEOUT_S = 10.0
"""A process whose connection has closed ends in this time, or is killed."""
MAX_OUTPUT = 8000
"""Characters of what a script printed before it died that its record keeps; the log has all."""


def _start(words: Sequence[str], variables: Mapping[str, str], folder: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """A process in a session of its own, which ends with its parent whatever becomes of that. Signals that stop a run
    wait until it is there."""
    parent, process = os.getpid(), None
    try:
        with held_back(SIGNALS):
            process = subprocess.Popen(
                list(words),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(variables),
                cwd=folder,
                start_new_session=True,
                preexec_fn=lambda: end_with_parent(parent),
            )
    except BaseException:
        if process is not None:  # which nothing else will end
            kill_group(process.pid)
        raise
    return process


def _user_of(connection: socket.socket) -> int:
    """Whose process is at the other end, by the kernel's word (unix(7), SO_PEERCRED: pid, uid and gid)."""
    _, user, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)


class ScriptProcess:
    """One start of a script, which connects to a socket when its training begins."""

    def __init__(
        self, words: Sequence[str], variables: Mapping[str, str], *, folder: Path, log: Path, turns: str
    ) -> None:
        """Start it. Raises OSError where the system does not.

        Args:
            words: of its command, the program resolved.
            variables: its environment; the socket's name is in it.
            folder: it works in.
            log: what it prints is appended to.
            turns: name of the socket (`lorameter.attach.script_trial.address`).
        """
        self._hooked = variables.get(HOOKED, "")
        self._marker = f"{SOCKET}={turns}".encode()
        self._log, self._log_begin = log, log.stat().st_size if log.is_file() else 0
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.ExitStack() as stack:
            stack.callback(self._listener.close)
            with held_back(SIGNALS):
                self._guard = OrphanReaper(self._marker)
                stack.callback(self._guard.close)
            self._listener.bind(address(turns))
            self._listener.listen(8)
            with log.open("ab") as file:
                self._begun_s = time.monotonic()
                self._process = _start(words, variables, folder, file)
            stack.pop_all()

    def age_s(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self._begun_s

    def connect(self, timeout_s: float) -> Connection:
        """Wait until its training begins. Raises `WorkerLostError` where it ends before that, or does not begin."""
        deadline = time.monotonic() + timeout_s
        self._listener.settimeout(POLL_S)
        while time.monotonic() < deadline:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                if self._process.poll() is not None and not self._others():
                    break
                continue
            if _user_of(connection) == os.geteuid():  # a name that lies in no folder has no permissions
                connection.settimeout(None)
                return Connection(connection.detach())
            connection.close()
        raise self._without_training(timeout_s)

    def _without_training(self, timeout_s: float) -> WorkerLostError:
        code, output = self.exit_code(), self.output()
        lacking = read_missing_packages(Path(self._hooked)) if self._hooked else ""
        status: Status = "invalid"
        if self._hooked and not Path(self._hooked).exists() and code in (None, 0):
            kind, message = (
                "NotHooked",
                (
                    "no Python of the command has loaded the hook, so nothing of its training could be seen. It must "
                    "start a Python that reads PYTHONPATH (not -I, -E or -S, and not in a container of its own)."
                ),
            )
        elif lacking:
            kind, message = "Lacking", f"nothing can be measured: {lacking}"
        elif code is None:
            status, kind, message = (
                "timeout",
                "Silent",
                (
                    f"the script came to no training within {timeout_s:g} s and was killed: it hangs, or loads longer. "
                    "Raise step_timeout_s if it was at work"
                ),
            )
        elif code == 0:
            kind, message = (
                "NeverTrained",
                (
                    "the script ended with exit code 0 and trained nothing: no Trainer was run, no loop was named, and "
                    "no optimizer took a step. Name the command that trains."
                ),
            )
        else:
            status, last = self._last_line(output)
            kind, message = "Crashed", f"the script ended with {exit_words(code)} before it trained{last}"
        return WorkerLostError(status, Failure(phase="build", kind=kind, message=message, traceback=output))

    def death(self, phase: str) -> WorkerLostError:
        """How it ended after it had begun to train."""
        code, output = self.exit_code(END_TIMEOUT_S), self.output()
        status, last = self._last_line(output)
        message = f"the script's process is gone ({exit_words(code)}) during {phase}{last}"
        if code == -9:
            message += ": killed from outside, or by the kernel for want of memory (see dmesg)"
        return WorkerLostError(status, Failure(phase=phase, kind="ProcessDied", message=message, traceback=output))

    def _last_line(self, output: str) -> tuple[Status, str]:
        lines = output.splitlines()
        last = f": {lines[-1]}" if lines else ": it printed nothing"
        return "oom" if says_out_of_memory(last) else "crashed", last

    def output(self) -> str:
        """What it has printed, its end."""
        with contextlib.suppress(OSError):
            printed = self._log.read_bytes()[self._log_begin :].decode(errors="replace")
            return redact(printed).strip()[-MAX_OUTPUT:]
        return ""

    def exit_code(self, timeout_s: float = 0.0) -> int | None:
        """Its exit code, waited for so long; None where it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout_s) if timeout_s else self._process.poll()
        return None

    def kill(self) -> None:
        """End it and whatever it has started, wherever that is."""
        kill_group(self._process.pid)
        kill_marked(self._marker)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_TIMEOUT_S)

    def close(self) -> None:
        """Kill it, and no longer listen for it."""
        self.kill()
        self._guard.close()
        self._listener.close()

    def _others(self) -> list[int]:
        """Processes of this trial but the first: what a launcher that has ended left behind."""
        return [pid for pid in marked(self._marker) if pid != self._process.pid]
