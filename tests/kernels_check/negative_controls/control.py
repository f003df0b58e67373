"""A negative control, and when it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

from kernels_check.check import Check, Json
from negative_controls.small_run import SmallRun, build, forget_compilations

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


def failures_of(control: Control) -> list[str]:
    """Verify both runs; what does not hold."""
    try:
        broken = _verified(control.fault(), control)
        sound = _verified(control.healthy(), control)
    finally:
        forget_compilations()
    return _failures(control, broken, sound)


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
