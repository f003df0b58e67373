"""Commands of a process that is started for one of them: a cold start, or the tokens of a workload.

Nothing heavy is imported before the command is there: a cold start measures its own imports.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lorameter import wire
from lorameter.errors import InvalidRunError
from lorameter.records import codec
from lorameter.records.os_errors import find_system_error
from lorameter.studies.request import TrialRequest
from lorameter.studies.workload import Workload
from lorameter.trial.failure import failure_of


def serve_once(connection: Connection) -> None:
    """Carry out what is asked, until the parent closes the connection."""
    wire.serve(connection, lambda command: COMMANDS[command.name](**command.arguments))


def _cold(request: dict[str, Any], spawned_monotonic_s: float) -> object:
    from lorameter.trial.inference.cold import start_cold

    try:
        return start_cold(codec.from_json(TrialRequest, request, "trial request"), spawned_monotonic_s)
    except Exception as error:
        return failure_of(error, "cold")


def _imports(spawned_monotonic_s: float) -> object:
    from lorameter.trial.inference.cold import time_imports

    try:
        return time_imports(spawned_monotonic_s)
    except Exception as error:
        return failure_of(error, "cold")


def _tokens(workload: dict[str, Any], folder: str) -> object:
    from lorameter.trial.data.tokens import prepare

    try:
        return prepare(codec.from_json(Workload, workload, "token request"), Path(folder))
    except Exception as error:
        if refusal := find_system_error(error):
            raise InvalidRunError(f"the tokens could not be prepared: {refusal}.") from None
        raise


COMMANDS: dict[str, Callable[..., object]] = {"cold": _cold, "imports": _imports, "tokens": _tokens}
