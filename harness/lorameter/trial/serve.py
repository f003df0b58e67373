"""What a process that hosts trials does with a command; each is answered by a `PartialRecord`.

Standard output and error go to the trial's log.
"""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lorameter import wire
from lorameter.records import codec
from lorameter.records.record import PartialRecord
from lorameter.studies.request import BaseRequest, TrialRequest
from lorameter.studies.serving_modes import ServingRequest
from lorameter.trial.failure import failure_of


def serve(connection: Connection) -> None:
    """The loop of a trial's process: one answer for each command, until the parent closes the connection."""
    trials: dict[str, Any] = {}
    wire.serve(connection, lambda command: _answer(command, trials))


def _answer(command: wire.Command, trials: dict[str, Any]) -> PartialRecord:
    """Run one command; whatever goes wrong becomes a fragment with a status, never a dead connection."""
    from lorameter.trial.building.shared import SharedBase
    from lorameter.trial.process import prepare_process
    from lorameter.trial.trial import Trial

    phase, trial, arguments = command.name, command.trial, command.arguments
    try:
        if phase == "prepare":
            request = codec.from_json(TrialRequest, arguments["request"], "trial request")
            _log_to(Path(request.log_path))
            prepare_process(request)
            if request.workload.ranks > 1:
                from lorameter.trial.ranks.trial import TrialOfRanks

                trials[trial] = TrialOfRanks(request)
                return PartialRecord()
            shared = next((other.shared for other in trials.values()), None) or SharedBase()
            trials[trial] = (_profiled_trial() if arguments.get("profiled") else Trial)(request, shared)
            return PartialRecord()
        if phase == "base":
            return _prepared(codec.from_json(BaseRequest, arguments["request"], "base request"))
        if phase == "cold":
            return _loaded(codec.from_json(TrialRequest, arguments["request"], "trial request"))
        if phase == "parity":
            return _served(codec.from_json(ServingRequest, arguments["request"], "serving request"))
        return trials[trial].run(phase, **arguments)  # type: ignore[no-any-return]
    except Exception as error:
        return failure_of(error, phase)


def _prepared(request: BaseRequest) -> PartialRecord:
    """A base that every process of the run will map, made by this one, which then ends."""
    from lorameter.trial.building.base_cache import prepare
    from lorameter.trial.process import limit_threads

    _log_to(Path(request.log_path))
    limit_threads(request.device, request.threads)
    return PartialRecord(tokens={"base": codec.to_json(prepare(request))})


def _loaded(request: TrialRequest) -> PartialRecord:
    """A cold start after its imports, by this process alone, which then ends."""
    from lorameter.trial.inference.cold import load_and_answer

    _log_to(Path(request.log_path))
    return load_and_answer(request)


def _served(request: ServingRequest) -> PartialRecord:
    """An adapter in the ways that one base allows, by this process alone, which then ends."""
    from lorameter.trial.parity.serving import serve_adapter

    _log_to(Path(request.trial.log_path))
    return serve_adapter(request)


def _profiled_trial() -> Any:
    """The profiled trial of `lorameter profile`; other trials do not pay for its imports."""
    from lorameter.trial.profiling.trial import ProfiledTrial

    return ProfiledTrial


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
