"""Standard streams whose other end can go away, for every program of this distribution.

Standard error carries notices. A reader that is gone (a closed terminal, a full disk, a pager that was left alone)
must neither end nor hold up the measurement, which may have run for hours: what cannot be written there
is dropped.

Standard output carries the result. A reader that has seen enough (`| head -1`) ends a program as it ends others: at
once, without a word, with the exit code that a shell gives to one that was killed by SIGPIPE. Where the result cannot
be written for another reason, that is said.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

EXIT_CLOSED_PIPE = 141
"""128 + SIGPIPE: what a shell says of `git log | head -1`."""
EXIT_UNWRITABLE = 4
"""The exit code of what could not be done on this machine."""


class BrokenOutputError(BaseException):
    """Nothing more can be written to standard output. Not to be caught as a defect of what was writing."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror)
        self.closed = error.errno == errno.EPIPE
        """Whether its reader has gone away."""


class _Stream(ABC):
    """A text stream as it was given, but for what happens where it cannot be written."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """All of the text; characters that the encoding lacks as escape sequences."""
        self._try(lambda: self._write(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """One after the other."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Have the other end see it."""
        self._try(self._stream.flush)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self._silence()
            self._lost(error)

    @abstractmethod
    def _lost(self, error: OSError) -> None:
        """What is done where it cannot be written."""

    def _silence(self) -> None:
        """What is still in a buffer goes nowhere: the interpreter writes it out at its end, and would end with 120."""
        with contextlib.suppress(OSError, ValueError):  # no file behind it
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


PATIENCE_S = 10.0
"""Who reads asides may pause for as long; longer, and he is taken for one that has left."""


class BestEffortStderr(_Stream):
    """A stream that takes whatever can be written, and drops the rest."""

    def _try(self, action: Callable[[], object]) -> None:
        if self._is_read():
            super()._try(action)
        else:
            self._silence()

    def _is_read(self) -> bool:
        """Whether there is room for more, now or soon. What has no file behind it always has."""
        try:
            number = self._stream.fileno()
        except (OSError, ValueError, AttributeError):
            return True
        waiting = select.poll()
        waiting.register(number, select.POLLOUT)
        return bool(waiting.poll(1000 * PATIENCE_S))

    def _lost(self, error: OSError) -> None:
        """Do nothing."""


class Result(_Stream):
    """A stream that must be written. Raises `BrokenOutputError` where it cannot."""

    def _lost(self, error: OSError) -> None:
        raise BrokenOutputError(error)


class CapturedStdout(_Stream):
    """A stream that drops what cannot be written and remembers why, so that the measurement comes to its end."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.lost: OSError | None = None

    def _lost(self, error: OSError) -> None:
        self.lost = self.lost or error

    def drain(self) -> None:
        """Have nothing left in a buffer that would be written out later."""
        self._silence()
        self.flush()


def with_streams(name: str, program: Callable[[], int]) -> int:
    """Run a program on the standard streams of this process, and return its exit code or that of a lost output.

    Args:
        name: of the program, for its message.
        program: returns its exit code.
    """
    _open_closed()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Result(sys.stdout), BestEffortStderr(sys.stderr)
    try:
        try:
            return program()
        finally:
            sys.stdout.flush()
    except BrokenOutputError as lost:
        if lost.closed:
            return EXIT_CLOSED_PIPE
        print(f"{name}: standard output cannot be written: {lost}.", file=sys.stderr)
        return EXIT_UNWRITABLE
    finally:
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _open_closed() -> None:
    """Streams that were closed from the start (`>&-`) lead nowhere: the next file to be opened would take their number,
    and whatever a library prints would be written into it."""
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    for stream, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
