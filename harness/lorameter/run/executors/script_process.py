"""A script's process and all that it starts, as its parent sees them: started, heard, silent, dead, ended.

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
from pathlib import Path
from typing import IO, Any

from lorameter.attach.marker_files import lacking_in
from lorameter.attach.turn_client import SOCKET, address
from lorameter.attach.variables import SEEN
from lorameter.machine.orphan_reaper import OrphanReaper, kill_marked, marked
from lorameter.machine.processes import end_with_parent, held_back, kill_group
from lorameter.run.executors.channel import Channel
from lorameter.run.interrupts import SIGNALS

LOOK_S = 0.05
"""How often a process that has not spoken yet is looked at: it is loading, and nothing is timed."""
END_TIMEOUT_S = 10.0
"""A process whose connection has closed ends in this time, or is killed."""


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
        if process is not None:  # and nobody will hear of it
            kill_group(process.pid)
        raise
    return process


def _user_of(connection: socket.socket) -> int:
    """Whose process is at the other end, by the kernel's word (unix(7), SO_PEERCRED: pid, uid and gid)."""
    _, user, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)


class ScriptProcess:
    """One start of a script, listened to on a socket."""

    def __init__(
        self, words: Sequence[str], variables: Mapping[str, str], *, folder: Path, log: Path, turns: str
    ) -> None:
        """Start it. Raises OSError where the system does not.

        Args:
            words: of its command, the program resolved.
            variables: its environment; the socket's name is in it.
            folder: it works in.
            log: what it prints is appended to.
            turns: name of the socket where it will be heard (`lorameter.attach.turn_client.address`).
        """
        self._seen = variables.get(SEEN, "")
        self._marker = f"{SOCKET}={turns}".encode()
        self._channel: Channel | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.ExitStack() as stack:
            stack.callback(self._listener.close)
            with held_back(SIGNALS):
                self._guard = OrphanReaper(self._marker)
                stack.callback(self._guard.close)
            self._listener.bind(address(turns))
            self._listener.listen(8)
            with log.open("ab") as file:
                self.begun_monotonic_s = time.monotonic()
                self._process = _start(words, variables, folder, file)
            stack.pop_all()

    @property
    def hooked(self) -> bool:
        """Whether a Python of it has loaded the hook, as far as that can be told; else nothing is ever heard."""
        return not self._seen or Path(self._seen).exists()

    @property
    def lacking(self) -> str:
        """What its interpreter lacks to be measured, in words; nothing where that is all there."""
        return lacking_in(Path(self._seen)) if self._seen else ""

    @property
    def closed(self) -> bool:
        """Whether the process that spoke has hung up."""
        return self._channel is not None and self._channel.closed_by_peer

    def age_s(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self.begun_monotonic_s

    def first_word(self, timeout_s: float) -> dict[str, Any] | None:
        """Wait until it speaks; None where it has ended before that, or is silent for so long (`ended` tells which).

        Raises:
            GarbledError: what it says is no message.
        """
        deadline = time.monotonic() + timeout_s
        self._listener.settimeout(LOOK_S)
        while time.monotonic() < deadline:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                if self._process.poll() is not None and not self._lives():
                    return None
                continue
            if _user_of(connection) != os.geteuid():  # a name that lies in no folder has no permissions
                connection.close()
                continue
            connection.settimeout(None)
            self._channel = Channel(connection)
            return self._channel.receive(max(LOOK_S, deadline - time.monotonic()))
        return None

    def tell(self, message: dict[str, Any]) -> None:
        """Say something to it; nothing is raised where it is gone."""
        if self._channel is None:
            raise RuntimeError("nobody has spoken yet, so there is nobody to be told")
        self._channel.send(message)

    def hear(self, timeout_s: float) -> dict[str, Any] | None:
        """Its next word; None where it is gone (`closed`) or silent. Raises `GarbledError`."""
        if self._channel is None:
            raise RuntimeError("nobody has spoken yet, so there is nobody to be heard")
        return self._channel.receive(timeout_s)

    def ended(self, grace_s: float = 0.0) -> int | None:
        """Its exit code, waited for so long; None where it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(grace_s) if grace_s else self._process.poll()
        return None

    def kill(self) -> None:
        """End it and whatever it has started, wherever that is."""
        kill_group(self._process.pid)
        kill_marked(self._marker)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_TIMEOUT_S)

    def close(self) -> None:
        """Kill it, and no more of this conversation."""
        self.kill()
        self._guard.close()
        if self._channel is not None:
            self._channel.close()
        self._listener.close()

    def _lives(self) -> bool:
        """Whether something of the trial runs, although what was started has ended: a launcher that went ahead."""
        return bool(self._others())

    def _others(self) -> list[int]:
        """Processes of this trial but the first, by the socket in their environment."""
        return [pid for pid in marked(self._marker) if pid != self._process.pid]
