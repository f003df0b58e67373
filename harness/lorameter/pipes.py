"""Standard streams whose reader may go away, for all programs of this distribution.

Standard error carries notices. If its reader is gone (a closed terminal, a full disk, a suspended pager), the
measurement, which may have run for hours, must neither end nor wait: text that cannot be written is dropped.

Standard output carries the result. If its reader closes the pipe (`| head -1`), the program ends at once, without a
message, with the exit code of a process killed by SIGPIPE. Any other write error is reported.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import sys
from collections.abc import Callable
from typing import Any

EXIT_CLOSED_PIPE = 141
"""128 + SIGPIPE: the exit code of `git log` in `git log | head -1`."""
EXIT_UNWRITABLE = 4
"""The exit code for an operation that is not possible on this machine."""


class BrokenOutputError(BaseException):
    """Standard output cannot be written; a BaseException, since it is not a defect of the program."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror)
        self.closed = error.errno == errno.EPIPE
        """Whether its reader has gone away."""


class CapturedStdout:
    """A text stream that drops text that cannot be written and stores the error, so that the measurement completes."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the whole text; unencodable characters become escape sequences."""
        self._try(self._write, text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write lines one after the other."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the buffer."""
        self._try(self._stream.flush)

    def drain(self) -> None:
        """Discard the buffer: otherwise the interpreter would write it at exit, and exit with 120."""
        with contextlib.suppress(OSError, ValueError):  # no underlying file
            null_device = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null_device, self._stream.fileno())
            os.close(null_device)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))

    def _try(self, action: Callable[..., object], *given: str) -> None:
        try:
            action(*given)
        except OSError as error:
            self.drain()
            self.lost = self.lost or error


class Result(CapturedStdout):
    """A stream that must be written. Raises `BrokenOutputError` if it cannot."""

    def _try(self, action: Callable[..., object], *given: str) -> None:
        super()._try(action, *given)
        if self.lost is not None:
            raise BrokenOutputError(self.lost)


PATIENCE_S = 10.0
"""Seconds for which the reader of notices may pause before it counts as gone."""


class BestEffortStderr(CapturedStdout):
    """A stream that also drops text if its reader leaves the pipe full for longer than ``PATIENCE_S``."""

    def _try(self, action: Callable[..., object], *given: str) -> None:
        if self._is_read():
            super()._try(action, *given)
        else:
            self.drain()

    def _is_read(self) -> bool:
        """Whether the stream accepts text now or soon. A stream without a file always does."""
        try:
            number = self._stream.fileno()
        except (OSError, ValueError, AttributeError):
            return True
        waiting = select.poll()
        waiting.register(number, select.POLLOUT)
        return bool(waiting.poll(1000 * PATIENCE_S))


def with_streams(name: str, program: Callable[[], int]) -> int:
    """Run a program on the standard streams of this process; returns its exit code, or the code for lost output.

    Args:
        name: name of the program, for messages.
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
    """Open streams that were closed at the start (`>&-`) on the null device: otherwise the next opened file would get
    their number, and libraries would print into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor
    for stream, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
