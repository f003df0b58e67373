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

from lorameter.attach.launch import HOOKED, NOT_HOOKED, SOCKET, address, read_missing_packages
from lorameter.errors import redact
from lorameter.machine.processes import (
    OrphanReaper,
    end_with_parent,
    exit_words,
    held_back,
    kill_group,
    kill_marked,
    marked,
)
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


def _user_of(connection: socket.socket) -> int:
    """The user of the process at the other end, from the kernel (unix(7), SO_PEERCRED: pid, uid and gid)."""
    _, user, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)


class ScriptProcess:
    """One start of a script, which connects to a socket when its training begins."""

    def __init__(
        self, words: Sequence[str], variables: Mapping[str, str], *, folder: Path, log: Path, turns: str
    ) -> None:
        """Start it, in a session of its own and until this process ends. Raises OSError where the system does not.

        Args:
            words: of its command, the program resolved.
            variables: its environment; the socket's name is in it.
            folder: it works in.
            log: what it prints is appended to.
            turns: name of the socket (`lorameter.attach.launch.address`).
        """
        self._hooked = Path(variables[HOOKED]) if HOOKED in variables else None
        self._marker = f"{SOCKET}={turns}".encode()
        self._log, self._log_begin = log, log.stat().st_size if log.is_file() else 0
        parent = os.getpid()
        with contextlib.ExitStack() as stack:
            with held_back(SIGNALS):  # that stop a run: they come when the process is known, and is ended then
                self._listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                stack.callback(OrphanReaper(self._marker).close)
                self._listener.bind(address(turns))
                self._listener.listen(8)
                self._begun_s = time.monotonic()
                with log.open("ab") as file:
                    self._process = subprocess.Popen(
                        list(words),
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=file,
                        env=dict(variables),
                        cwd=folder,
                        start_new_session=True,
                        preexec_fn=lambda: end_with_parent(parent),
                    )
                stack.callback(self.kill)
            self._started = stack.pop_all()

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
                others = set(marked(self._marker)) - {self._process.pid}  # left behind by a launcher that has ended
                if self._process.poll() is not None and not others:
                    break
                continue
            if _user_of(connection) == os.geteuid():  # a name that lies in no folder has no permissions
                connection.settimeout(None)
                return Connection(connection.detach())
            connection.close()
        raise self._without_training(timeout_s)

    def _without_training(self, timeout_s: float) -> WorkerLostError:
        code, output = self._process.poll(), self.output()
        lacking = read_missing_packages(self._hooked) if self._hooked else ""
        status: Status = "invalid"
        if self._hooked and not self._hooked.exists() and not code:
            kind, message = "NotHooked", NOT_HOOKED
        elif lacking:
            kind, message = "Lacking", f"nothing can be measured: {lacking}"
        elif code is None:
            status, kind = "timeout", "Silent"
            message = (
                f"the script came to no training within {timeout_s:g} s and was killed: it hangs, or loads longer. "
                "Raise step_timeout_s if it was at work"
            )
        elif code == 0:
            kind = "NeverTrained"
            message = (
                "the script ended with exit code 0 and trained nothing: no Trainer was run, no loop was named, and no "
                "optimizer took a step. Name the command that trains."
            )
        else:
            status, last = _judge_output(output)
            kind, message = "Crashed", f"the script ended with {exit_words(code)} before it trained{last}"
        return WorkerLostError(status, Failure(phase="build", kind=kind, message=message, traceback=output))

    def death(self, phase: str) -> WorkerLostError:
        """How it ended after it had begun to train."""
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(END_TIMEOUT_S)
        output = self.output()
        status, last = _judge_output(output)
        message = f"the script's process is gone ({exit_words(code)}) during {phase}{last}"
        if code == -9:
            message += ": killed from outside, or by the kernel for want of memory (see dmesg)"
        return WorkerLostError(status, Failure(phase=phase, kind="ProcessDied", message=message, traceback=output))

    def output(self) -> str:
        """The end of what it has printed."""
        with contextlib.suppress(OSError):
            printed = self._log.read_bytes()[self._log_begin :].decode(errors="replace")
            return redact(printed).strip()[-MAX_OUTPUT:]
        return ""

    def kill(self) -> None:
        """End it and whatever it has started, wherever that is."""
        kill_group(self._process.pid)
        kill_marked(self._marker)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_TIMEOUT_S)

    def close(self) -> None:
        """Kill it, and no longer listen for it."""
        self._started.close()


def _judge_output(output: str) -> tuple[Status, str]:
    """The status of a process that died with this output, and its last line."""
    lines = output.splitlines()
    last = f": {lines[-1]}" if lines else ": it printed nothing"
    return "oom" if says_out_of_memory(last) else "crashed", last
