"""A negative control, and when it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

from kernels_check.check import Check, Json
from kernels_check.observe.compile import forget_compilations
from negative_controls.small_run import SmallRun, build

Build: TypeAlias = Callable[[], SmallRun]


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A run with a fault, and a healthy one."""

    name: str
    path: str
    """The path whose check must find the fault."""
    required: Json
    fault: Build
    healthy: Build
    words: tuple[str, ...]
    """All of them stand in the reason."""
    not_words: tuple[str, ...] = ()
    """None of them does."""
    caught_by: Literal["status", "reason", "unknown"] = "status"
    """``reason``: what was required did run, and the reason warns of what comes with it or of what CUDA would do.
    ``unknown``: the evidence contradicts itself, and the reason says where."""
    needs_cuda: str | None = None
    """Why it takes a GPU to show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One control that was run."""

    control: str
    path: str
    required: Json
    held: bool | None
    """None: skipped."""
    failure: str | None
    """What did not hold, or why it was skipped."""


def small(*changes: Callable[[SmallRun], object], **options: Any) -> Build:
    """A recipe: build a small run with ``options``, then apply the ``changes`` in order."""
    return changed(partial(build, **options), *changes)


def changed(make: Build, *changes: Callable[[SmallRun], object]) -> Build:
    """A recipe: make a run, then apply the ``changes`` in order."""
    return partial(_changed, make, changes)


def _changed(make: Build, changes: tuple[Callable[[SmallRun], object], ...]) -> SmallRun:
    run = make()
    for change in changes:
        change(run)
    return run


def run_control(control: Control) -> Outcome:
    """Build both runs, verify them, and compare with what is required; an exception is a control that failed."""
    import torch

    if control.needs_cuda is not None and not torch.cuda.is_available():
        return _outcome(control, None, f"needs a CUDA device: {control.needs_cuda}")
    try:
        broken = _verified(control.fault(), control)
        sound = _verified(control.healthy(), control)
    except Exception as error:
        return _outcome(control, False, f"{type(error).__name__}: {error}")
    finally:
        forget_compilations()
    failure = "; ".join(_failures(control, broken, sound)) or None
    return _outcome(control, failure is None, failure)


def _verified(run: SmallRun, control: Control) -> Check:
    check: Check = run.check(control.path, control.required)
    return check


def _failures(control: Control, broken: Check, sound: Check) -> list[str]:
    """Everything that a control requires and that does not hold."""
    failures = []
    if control.caught_by == "status" and broken.status not in ("fallback", "absent"):
        failures.append(f"the faulty run is {broken.status}")
    if control.caught_by == "unknown" and broken.status != "unknown":
        failures.append(f"the faulty run is {broken.status}")
    if control.caught_by == "reason" and not broken.met:
        failures.append(f"the faulty run is {broken.status}, although what was required ran")
    missing = [word for word in control.words if word not in broken.reason]
    failures += [f"its reason lacks {', '.join(map(repr, missing))}: {broken.reason}"] if missing else []
    present = [word for word in control.not_words if word in broken.reason]
    failures += [f"its reason has {', '.join(map(repr, present))}: {broken.reason}"] if present else []
    if not sound.met:
        failures.append(f"the healthy run is {sound.status}: {sound.reason}")
    if control.caught_by == "reason" and all(word in sound.reason for word in control.words):
        failures.append(f"the healthy run is given the same warning: {sound.reason}")
    return failures


def _outcome(control: Control, held: bool | None, failure: str | None) -> Outcome:
    return Outcome(
        control=control.name, path=control.path, required=control.required, held=held,
        failure=failure,
    )  # fmt: skip
