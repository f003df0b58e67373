"""How a training that somebody else runs has ended, as the status of a trial and its reason."""

from __future__ import annotations

import traceback

from lorameter.attach.error_guard import NotFollowedError
from lorameter.attach.observer import StepReading
from lorameter.attach.step_samples import StepSamples
from lorameter.errors import said_by
from lorameter.records.os_errors import REFUSED, find_system_error, is_out_of_memory
from lorameter.records.record import Failure, Status
from lorameter.records.units import format_count

Ending = tuple[Status, Failure | None]


def exit_status(error: BaseException | None, gathered: StepSamples, phase: str) -> Ending:
    """The status of a training that ended so, and the failure where it is not ok; `phase` is what it was in."""
    if error is not None:
        return _of_error(error, phase)
    if gathered.not_finite is not None:
        return "invalid", loss_not_finite(gathered.not_finite)
    if not gathered.timed:
        message = (
            f"the training ended after {format_count(gathered.steps, 'step')}, all of them its first, its warm-up or "
            "one that was watched, so none is timed. Train for longer."
        )
        return "invalid", Failure(phase="warm_up", kind="NothingTimed", message=message)
    return "ok", None


def loss_not_finite(reading: StepReading) -> Failure:
    """The failure of a training in which a step's loss is no number."""
    message = (
        f"the loss is {reading.loss} in step {reading.number}; a diverged run has no result. Lower the script's "
        "learning rate, or let it clip its gradients."
    )
    return Failure(phase="train", kind="LossNotFinite", message=message)


def _of_error(error: BaseException, phase: str) -> Ending:
    told = "".join(traceback.format_exception(error))
    message = said_by(error)
    if type(error) is NotFollowedError:
        return "invalid", Failure(phase=phase, kind="NotFollowed", message=message, traceback=told)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", Failure(phase=phase, kind="Interrupted", message="stopped by the user")
    if isinstance(error, Exception) and (refusal := find_system_error(error)):
        return "interrupted", Failure(phase=phase, kind=REFUSED, message=refusal, traceback=told)
    status: Status = "oom" if is_out_of_memory(error) else "crashed"
    return status, Failure(phase=phase, kind=type(error).__name__, message=message, traceback=told)
