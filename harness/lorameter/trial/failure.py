"""An exception as what a measuring process answers."""

from __future__ import annotations

import contextlib
import sys

from lorameter.records.failures import describe_error
from lorameter.records.record import PartialRecord


def failure_of(error: BaseException, phase: str) -> PartialRecord:
    """A fragment for an exception (`lorameter.records.failures`). The log has its traceback too, where it can be
    written."""
    status, failure = describe_error(error, phase)
    with contextlib.suppress(OSError):
        sys.stderr.write(failure.traceback)
        sys.stderr.flush()
    return PartialRecord().failed(status, failure)
