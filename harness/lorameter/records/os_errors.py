"""Turns operating-system errors (full disk, no file descriptors) into messages with remedies, and exceptions into
failures.

Such an error is neither a defect of lorameter nor a fault of a trial. It ends a run with the exit code of an unsuitable
machine, and earlier measurements are kept.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator

from lorameter.errors import InvalidRunError, UsageError
from lorameter.records.record import Failure, PartialRecord, Status

_SPACE = "Free space there"
REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EROFS: "Choose a folder that can be written",
    errno.EACCES: "Choose a folder that can be written",
    errno.EPERM: "Choose a folder that can be written",
    errno.EFBIG: "Raise the limit of file sizes (ulimit -f)",
    errno.EMFILE: "Raise the limit of open files (ulimit -n)",
    errno.ENFILE: "Close programs that have many files open",
    errno.ENOMEM: "Free memory",
    errno.EAGAIN: "End other processes, or raise their limit (ulimit -u)",
    errno.EIO: "Check the disk",
    errno.ESTALE: "Check the disk",
    errno.ENAMETOOLONG: "Choose a shorter path",
    errno.ENOENT: "Restore the file, and do not change it during a measurement",
}
"""Remedies by error number."""
MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EMFILE, errno.ENFILE)
"""Errors that are not a fault of a trial, and that would also affect the next trial."""
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "OutOfMemoryError", "MemoryError", "std::bad_alloc")
REFUSED = "Refused"
"""Kind of the failure of a trial that such an error interrupted."""


class SystemLimitError(Exception):
    """Raised if a system limit stopped a measuring process; the message says which one, and what to do."""


def format_os_error(error: OSError) -> str:
    """The error message with its remedy."""
    cause = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    return f"{cause}. {REMEDIES.get(error.errno or 0, 'Check the disk')}"


def find_system_error(error: BaseException | None) -> str | None:
    """The message of a system error that is not a fault of the trial; None for any other error.

    Libraries wrap system errors: in an exception that was raised from it, or in their own exception that repeats its
    message (safetensors: "I/O error: No space left on device (os error 28)").
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            return format_os_error(error)
        if refusal := extract_os_error(str(error)):
            return refusal
        error = error.__cause__ or error.__context__
    return None


def extract_os_error(text: str) -> str | None:
    """The system error message that a library or another program repeats, in the form of Rust or Python; None if there
    is none."""
    for number in MACHINE_ERRORS:
        words = os.strerror(number)
        if f"{words} (os error {number})" in text or f"[Errno {number}] {words}" in text:
            return format_os_error(OSError(number, words))
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the memory of the device or the machine ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and mentions_out_of_memory(str(error))  # raised by torch's CPU allocator


def mentions_out_of_memory(text: str) -> bool:
    """Whether the last output of a program says that memory ran out."""
    return any(words in text for words in _OUT_OF_MEMORY)


@contextlib.contextmanager
def translate_write_errors(where: str, remedy: str, *, done: str = "written") -> Iterator[None]:
    """Convert an error while writing a user's file into an `InvalidRunError` if the machine is the cause (a full disk),
    else into a `UsageError`.

    Args:
        where: the option or the variable, and its value.
        remedy: a sentence that says what to use instead.
        done: the past participle of the failed operation, such as "written".
    """
    try:
        yield
    except OSError as error:
        number = error.errno or 0
        if number in MACHINE_ERRORS:
            reason = format_os_error(OSError(number, os.strerror(number)))
            raise InvalidRunError(f"{where}: {reason}, or {remedy[0].lower()}{remedy[1:]}") from None
        raise UsageError(f"{where}: cannot be {done}: {error.strerror or error}. {remedy}") from None


@contextlib.contextmanager
def translate_os_errors(describe: Callable[[], tuple[str, str]]) -> Iterator[None]:
    """Convert a system error inside the block into an `InvalidRunError`. `describe` returns the consequence, and what
    to do after its cause is removed ("" for nothing)."""
    try:
        yield
    except (OSError, MemoryError, SystemLimitError) as error:
        if isinstance(error, SystemLimitError):
            reason = str(error)
        else:
            reason = (
                format_os_error(error) if isinstance(error, OSError) else "this process ran out of memory. Free memory"
            )
        where, then = describe()
        raise InvalidRunError(f"{where}: {reason}{', then ' if then else ''}{then}.") from error


# --- failures of trials -----------------------------------------------------------------------------------------------

MAX_LINE, MAX_TRACEBACK = 2000, 16_000
"""Maximum characters in a record; the trial's log has the full text. Texts are cut before they are redacted, which is
slow for very long ones: lines at their ends and tracebacks between lines, so that a secret is never separated from its
name."""


def describe_error(error: BaseException, phase: str) -> tuple[Status, Failure]:
    """The status and the failure of a trial that an exception ended, with its traceback: `oom` if memory ran out,
    `interrupted` for a system error that would affect any trial (a full disk), else `crashed`."""
    text = _truncate("".join(traceback.format_exception(error)))
    if refusal := find_system_error(error):
        return "interrupted", Failure(phase=phase, kind=REFUSED, message=refusal, traceback=text)
    status: Status = "oom" if is_out_of_memory(error) else "crashed"
    line = next(iter(str(error).strip().splitlines()), "")[:MAX_LINE]
    message = line if len(line.split()) > 1 else f"{type(error).__name__}: {line}".removesuffix(": ")
    return status, Failure(phase=phase, kind=type(error).__name__, message=message, traceback=text)


def failed_record(error: BaseException, phase: str) -> PartialRecord:
    """The answer of a measuring process to a command that raised an exception; its traceback also goes to the log, if
    that can be written."""
    status, failure = describe_error(error, phase)
    with contextlib.suppress(OSError):
        sys.stderr.write(failure.traceback)
        sys.stderr.flush()
    return PartialRecord().failed(status, failure)


def _truncate(text: str) -> str:
    lines = "\n".join(line[:MAX_LINE] for line in text.splitlines())
    return f"{lines}\n" if len(lines) <= MAX_TRACEBACK else lines[-MAX_TRACEBACK:].partition("\n")[2]
