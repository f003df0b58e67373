"""How a training that somebody else runs has ended, as the status of a trial and its reason."""

from __future__ import annotations

from lorameter.attach.error_guard import NotFollowedError
from lorameter.attach.step_samples import StepSamples
from lorameter.records.failures import describe_error
from lorameter.records.record import Failure, Status
from lorameter.records.units import format_count


def exit_status(error: BaseException | None, gathered: StepSamples, phase: str) -> tuple[Status, Failure | None]:
    """The status of a training that ended so, and the failure where it is not ok; `phase` is what it was in."""
    if error is not None:
        return describe_end(error, phase)
    if gathered.not_finite is not None:
        return "invalid", gathered.not_finite
    if not gathered.timed:
        message = (
            f"the training ended after {format_count(gathered.steps, 'step')}, all of them its first, its warm-up or "
            "one that was watched, so none is timed. Train for longer."
        )
        return "invalid", Failure(phase="warm_up", kind="NothingTimed", message=message)
    return "ok", None


def describe_end(error: BaseException, phase: str) -> tuple[Status, Failure]:
    """The status and the failure of a training that an exception ended, or that was not followed to its end."""
    status, failure = describe_error(error, phase)
    if type(error) is NotFollowedError:
        return "invalid", Failure(phase=phase, kind="NotFollowed", message=str(error), traceback=failure.traceback)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", Failure(phase=phase, kind="Interrupted", message="stopped by the user")
    return status, failure
