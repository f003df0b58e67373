"""Executes the commands of a measuring process, which hosts trials or is started for a single command.

Heavy libraries are imported after the command has arrived: a cold start measures its own imports. Standard output and
error of a process that hosts trials go to the trial's log.
"""

from __future__ import annotations

import os
import pkgutil
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec

from lorameter import wire
from lorameter.errors import InvalidRunError
from lorameter.records import codec
from lorameter.records.os_errors import failed_record, find_system_error
from lorameter.records.record import PartialRecord
from lorameter.studies.request import BaseRequest, ServingRequest, TrialRequest
from lorameter.studies.workload import Workload


def serve(connection: Connection) -> None:
    """Serve a process that hosts trials: answer each command until the parent closes the connection. An exception
    becomes a fragment with its status."""
    trials: dict[str, Any] = {}

    def answer(command: wire.Command) -> PartialRecord:
        try:
            if command.name == "prepare":
                trials[command.trial] = _prepare_trial(trials, **command.arguments)
                return PartialRecord()
            if command.name in PROCESS_COMMANDS:
                return _execute(command.name, **command.arguments)
            return trials[command.trial].run(command.name, **command.arguments)  # type: ignore[no-any-return]
        except Exception as error:
            return failed_record(error, command.name)

    wire.serve(connection, answer)


def _prepare_trial(trials: dict[str, Any], request: dict[str, Any], profiled: bool = False) -> Any:
    from lorameter.trial.building.build import SharedBase
    from lorameter.trial.process import prepare_process
    from lorameter.trial.trial import Trial

    decoded = codec.from_json(TrialRequest, request, "trial request")
    _log_to(decoded.log_path)
    prepare_process(decoded)
    if decoded.workload.ranks > 1:
        from lorameter.trial.ranks.trial import TrialOfRanks

        return TrialOfRanks(decoded)
    shared = next((other.shared for other in trials.values()), None) or SharedBase()
    if profiled:  # other trials need not import it
        from lorameter.trial.profiling.trial import ProfiledTrial

        return ProfiledTrial(decoded, shared)
    return Trial(decoded, shared)


PROCESS_COMMANDS: dict[str, tuple[Any, str]] = {
    "base": (BaseRequest, "building.base_cache:prepare_base"),
    "cold": (TrialRequest, "measurements.cold:load_and_answer"),
    "parity": (ServingRequest, "serving.adapters:serve_adapter"),
    "times": (TrialRequest, "step_times:time_parts"),
}
"""Commands of processes that end after one command: the type of the request, and the function in `lorameter.trial` that
answers it."""


def _execute(command: str, request: dict[str, Any]) -> PartialRecord:
    kind, function = PROCESS_COMMANDS[command]
    decoded = codec.from_json(kind, request, f"{command} request")
    _log_to(decoded.trial.log_path if kind is ServingRequest else decoded.log_path)
    return pkgutil.resolve_name(f"lorameter.trial.{function}")(decoded)  # type: ignore[no-any-return]


def _log_to(log: str) -> None:
    path = Path(log)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


# --- a new interpreter ------------------------------------------------------------------------------------------------


def serve_once(connection: Connection) -> None:
    """Serve an interpreter that is started for one command, until the parent closes the connection."""
    wire.serve(connection, lambda command: COMMANDS[command.name](**command.arguments))


def _start_cold(spawned_monotonic_s: float, request: dict[str, Any] | None = None) -> PartialRecord:
    """Time a cold start, or without a request only its imports. CLOCK_MONOTONIC is common to all processes of a
    machine, so the times include the start of the interpreter."""
    try:
        from lorameter.trial.measurements.cold import load_and_answer

        imports = {"cold_import_time_s": time.monotonic() - spawned_monotonic_s}
        if request is None:
            return PartialRecord(values=imports)
        fragment = load_and_answer(codec.from_json(TrialRequest, request, "trial request"))
        values = fragment.values | imports | {"cold_start_time_s": time.monotonic() - spawned_monotonic_s}
        del values["cold_after_import_time_s"]
        return msgspec.structs.replace(fragment, values=values)
    except Exception as error:
        return failed_record(error, "cold")


def _prepare_tokens(workload: dict[str, Any], folder: str) -> object:
    from lorameter.trial.data.tokens import prepare

    try:
        return prepare(codec.from_json(Workload, workload, "token request"), Path(folder))
    except Exception as error:
        if refusal := find_system_error(error):
            raise InvalidRunError(f"the tokens could not be prepared in {folder}: {refusal}.") from None
        raise


COMMANDS: dict[str, Callable[..., object]] = {"cold": _start_cold, "tokens": _prepare_tokens}
