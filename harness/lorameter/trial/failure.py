"""An exception as data: what a measuring process says of itself when something goes wrong in it."""

from __future__ import annotations

import contextlib
import sys
import traceback

from lorameter.errors import redact
from lorameter.records.os_errors import REFUSED, find_system_error, is_out_of_memory
from lorameter.records.record import Failure, PartialRecord, Status


def failure_of(error: BaseException, phase: str) -> PartialRecord:
    """A fragment for an exception, with its traceback: `oom` when memory ran out, `interrupted` when the system refused
    what it would refuse to any trial (a full disk), else `crashed`. The log has it too, where it can be written."""
    text = redact(traceback.format_exc())
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()
    if refusal := find_system_error(error):
        failure = Failure(phase=phase, kind=REFUSED, message=refusal, traceback=text)
        return PartialRecord().failed("interrupted", failure)
    status: Status = "oom" if is_out_of_memory(error) else "crashed"
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    return PartialRecord().failed(
        status, Failure(phase=phase, kind=type(error).__name__, message=message, traceback=text)
    )
