"""The process of one rank, as the process that forked it sees it, and what it does.

A rank is forked like a trial: from a process that has imported everything, has run nothing and has one thread. It ends
by `os._exit`, since the threads of its exchanges abort a plain exit of the interpreter now and then.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from lorameter import wire
from lorameter.machine.processes import fork_process
from lorameter.records.os_errors import failed_record
from lorameter.records.record import PartialRecord


class RankProcess:
    """One forked process that answers commands as a trial does; `name` says which in messages."""

    def __init__(self, name: str, make: Callable[[], Any], strangers: list[RankProcess]) -> None:
        """Fork; in the child `make` makes the trial, at its first command, and what `strangers` have is closed."""
        self.name = name
        self._connection, theirs = wire.pair()
        self._greeted = False
        self.code: int | None = None
        """Its exit status, once it has ended and been reaped."""
        self.pid = fork_process(lambda: self._serve(theirs, make, strangers))
        theirs.close()

    def _serve(self, connection: Connection, make: Callable[[], Any], strangers: list[RankProcess]) -> None:
        self._connection.close()
        for other in strangers:
            other._connection.close()
        made: list[Any] = []

        def answer(command: wire.Command) -> PartialRecord:
            try:
                if not made:
                    made.append(make())
                return made[0].run(command.name, **command.arguments)  # type: ignore[no-any-return]
            except Exception as error:
                return failed_record(error, command.name)

        with connection:
            wire.serve(connection, answer)

    def fileno(self) -> int:
        """Of its connection, for `selectors`."""
        return self._connection.fileno()

    def send(self, command: str, arguments: dict[str, Any]) -> None:
        """Send a command; a process that has ended is found when its answer is received."""
        with contextlib.suppress(wire.ClosedError):
            wire.send(self._connection, wire.Command(command, arguments=arguments))

    def receive(self) -> PartialRecord | None:
        """Its answer, or None for its greeting. Raises `ClosedError` where it has ended."""
        if not self._greeted:
            wire.receive(self._connection, wire.Hello)
            self._greeted = True
            return None
        return wire.receive_answer(self._connection, PartialRecord)

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
