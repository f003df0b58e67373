"""An exception as the failure of a trial."""

from __future__ import annotations

import contextlib
import sys
import traceback

from lorameter.records.os_errors import REFUSED, find_system_error, is_out_of_memory
from lorameter.records.record import Failure, PartialRecord, Status

MAX_LINE, MAX_TRACEBACK = 2000, 16_000
"""Characters that a record keeps; the trial's log has all. Texts are cut before they are redacted, which takes long for
very long ones: lines at their ends and tracebacks between lines, so that no secret is parted from its name."""


def describe_error(error: BaseException, phase: str) -> tuple[Status, Failure]:
    """The status and the failure of a trial that an exception ended, with its traceback: `oom` where memory ran out,
    `interrupted` where the system refused what it would refuse to any trial (a full disk), else `crashed`."""
    text = _cut("".join(traceback.format_exception(error)))
    if refusal := find_system_error(error):
        return "interrupted", Failure(phase=phase, kind=REFUSED, message=refusal, traceback=text)
    status: Status = "oom" if is_out_of_memory(error) else "crashed"
    line = next(iter(str(error).strip().splitlines()), "")[:MAX_LINE]
    message = line if len(line.split()) > 1 else f"{type(error).__name__}: {line}".removesuffix(": ")
    return status, Failure(phase=phase, kind=type(error).__name__, message=message, traceback=text)


def failed_record(error: BaseException, phase: str) -> PartialRecord:
    """The answer of a measuring process to a command that raised; its traceback goes to the log too, where that can be
    written."""
    status, failure = describe_error(error, phase)
    with contextlib.suppress(OSError):
        sys.stderr.write(failure.traceback)
        sys.stderr.flush()
    return PartialRecord().failed(status, failure)


def _cut(text: str) -> str:
    lines = "\n".join(line[:MAX_LINE] for line in text.splitlines())
    return f"{lines}\n" if len(lines) <= MAX_TRACEBACK else lines[-MAX_TRACEBACK:].partition("\n")[2]
