"""An exception as data: what a measuring process says of itself when something goes wrong in it."""

from __future__ import annotations

import sys
import traceback

from harness.errors import redact
from harness.records.record import Failure, Fragment, Status


def failure_of(error: BaseException, phase: str) -> Fragment:
    """A fragment for an exception: `oom` when memory ran out, else `crashed`, with the traceback."""
    text = redact(traceback.format_exc())
    sys.stderr.write(text)
    sys.stderr.flush()
    status: Status = "oom" if is_out_of_memory(error) else "crashed"
    message = redact(str(error)).splitlines()[0] if str(error) else type(error).__name__
    return Fragment().failed(status, Failure(phase=phase, kind=type(error).__name__, message=message, traceback=text))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, of the device or of the machine."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)  # torch's CPU allocator raises a plain RuntimeError
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
