"""How a training that somebody else runs has ended, as the status of a trial and its reason."""

from __future__ import annotations

import traceback

from harness.attach.gathered import Gathered
from harness.attach.shield import NotFollowedError
from harness.errors import redact, said_by
from harness.records.record import Failure, Status
from harness.records.refusals import REFUSED, refusal_in
from harness.trial.failure import is_out_of_memory

Ending = tuple[Status, Failure | None]


def ending_of(error: BaseException | None, gathered: Gathered, phase: str) -> Ending:
    """The status of a training that ended so, and the failure where it is not ok; `phase` is what it was in."""
    if error is not None:
        return _of_error(error, phase)
    if gathered.not_finite is not None:
        step, loss = gathered.not_finite.number, gathered.not_finite.loss
        message = f"the loss is {loss} in step {step}; a diverged run has no result. Lower the learning rate, or clip."
        return "invalid", Failure(phase="train", kind="LossNotFinite", message=message)
    if not gathered.timed:
        message = (
            f"the training ended after {gathered.steps} steps, all of them its first, its warm-up or one that was "
            "watched, so none is timed. Train for longer."
        )
        return "invalid", Failure(phase="warm_up", kind="NothingTimed", message=message)
    return "ok", None


def _of_error(error: BaseException, phase: str) -> Ending:
    told = redact("".join(traceback.format_exception(error)))
    message = redact(said_by(error))
    if isinstance(error, NotFollowedError) and type(error) is NotFollowedError:
        return "invalid", Failure(phase=phase, kind="NotFollowed", message=message, traceback=told)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", Failure(phase=phase, kind="Interrupted", message="stopped by the user")
    if isinstance(error, Exception) and (refusal := refusal_in(error)):
        return "interrupted", Failure(phase=phase, kind=REFUSED, message=redact(refusal), traceback=told)
    status: Status = "oom" if is_out_of_memory(error) else "crashed"
    return status, Failure(phase=phase, kind=type(error).__name__, message=message, traceback=told)
