"""The process of one rank, as the process that forked it sees it, and what it does.

A rank is forked like a trial: from a process that has imported everything, has run nothing and has one thread. It ends
by `os._exit`, since the threads of its exchanges abort a plain exit of the interpreter now and then.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from lorameter.machine.processes import end_with_parent
from lorameter.records import codec
from lorameter.records.record import PartialRecord
from lorameter.trial.failure import failure_of
from lorameter.trial.lines import answer_lines


class RankProcess:
    """One forked process that answers commands as a trial does; `name` says which in messages."""

    def __init__(self, name: str, make: Callable[[], Any], strangers: list[RankProcess]) -> None:
        """Fork; in the child `make` makes the trial, at its first command, and what `strangers` have is closed."""
        self.name = name
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._heard = b""
        self.code: int | None = None
        """Its exit status, once it has ended and been reaped."""
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            self._become(theirs, make, strangers, parent)
        theirs.close()

    def _become(
        self, connection: socket.socket, make: Callable[[], Any], strangers: list[RankProcess], parent: int
    ) -> NoReturn:
        code = 1
        try:
            self._connection.close()
            for other in strangers:
                other._connection.close()
            end_with_parent(parent)
            made: list[Any] = []

            def answer(command: dict[str, Any]) -> PartialRecord:
                word = str(command.pop("do"))
                try:
                    if not made:
                        made.append(make())
                    return made[0].run(word, **command)  # type: ignore[no-any-return]
                except Exception as error:
                    return failure_of(error, word)

            with connection:
                answer_lines(connection, answer)
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def fileno(self) -> int:
        """Of its connection, for `selectors`."""
        return self._connection.fileno()

    def tell(self, command: str, arguments: dict[str, Any]) -> None:
        """Send a command; one that has ended does not hear it, and is found when its answer is waited for."""
        with contextlib.suppress(OSError):
            self._connection.sendall((json.dumps({"do": command, **arguments}) + "\n").encode())

    def hear(self) -> PartialRecord | None:
        """Read what has come: its answer, or None while that is not whole. Raises EOFError where it has ended."""
        try:
            said = self._connection.recv(1 << 20)
        except OSError:
            said = b""
        if not said:
            raise EOFError
        self._heard += said
        while b"\n" in self._heard:
            line, _, self._heard = self._heard.partition(b"\n")
            data = json.loads(line)
            if "started_monotonic_s" not in data:  # its greeting
                return codec.from_json(PartialRecord, data, f"answer of {self.name}")
        return None

    def end(self) -> None:
        """Kill it if it still runs, and reap it."""
        if self.code is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.reap()

    def reap(self) -> None:
        """Wait for its end."""
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self._connection.close()
