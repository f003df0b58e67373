"""What a negative control is, and what it means for it to hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

from kernels_check.check import INSTRUMENTS, Check, Instrument, Json
from kernels_check.controls.small_run import SmallRun, build
from kernels_check.observation import compilations

Build: TypeAlias = Callable[[], SmallRun]


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """One sabotage and its twin."""

    name: str
    path: str
    """The path that must catch it."""
    required: Json
    sabotage: Build
    twin: Build
    words: tuple[str, ...]
    """All of them stand in the reason."""
    not_words: tuple[str, ...] = ()
    """None of them does."""
    caught_by: Literal["status", "reason", "unknown"] = "status"
    """``reason``: what was required did run, and the reason warns of what comes with it or of what CUDA would do.
    ``unknown``: the evidence contradicts itself, and the reason says where."""
    instruments: tuple[Instrument, ...] = INSTRUMENTS
    """Those that can see it."""
    needs_cuda: str | None = None
    """Why it takes a GPU to show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One control, run with one instrument."""

    control: str
    path: str
    required: Json
    instrument: str
    held: bool | None
    """None: skipped."""
    fault: str | None
    """What did not hold, or why it was skipped."""
    sabotage: Check | None = None
    twin: Check | None = None


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


def run_control(control: Control, instrument: Instrument) -> Outcome:
    """Build both runs, verify them, and compare with what is promised; an exception is a control that failed."""
    import torch

    if control.needs_cuda is not None and not torch.cuda.is_available():
        return _outcome(control, instrument, None, f"needs a CUDA device: {control.needs_cuda}")
    try:
        broken = _verified(control.sabotage(), control, instrument)
        sound = _verified(control.twin(), control, instrument)
    except Exception as error:
        return _outcome(control, instrument, False, f"{type(error).__name__}: {error}")
    finally:
        compilations.forget()
    fault = "; ".join(_faults(control, broken, sound)) or None
    return _outcome(control, instrument, fault is None, fault, broken, sound)


def _verified(run: SmallRun, control: Control, instrument: Instrument) -> Check:
    run.instrument = instrument
    check: Check = run.check(control.path, control.required)
    return check


def _faults(control: Control, broken: Check, sound: Check) -> list[str]:
    """Everything that a control promises and that does not hold."""
    faults = []
    if control.caught_by == "status" and broken.status not in ("fallback", "absent"):
        faults.append(f"the sabotage is {broken.status}")
    if control.caught_by == "unknown" and broken.status != "unknown":
        faults.append(f"the sabotage is {broken.status}")
    if control.caught_by == "reason" and not broken.met:
        faults.append(f"the sabotage is {broken.status}, although what was required ran")
    missing = [word for word in control.words if word not in broken.reason]
    faults += [f"its reason lacks {', '.join(map(repr, missing))}: {broken.reason}"] if missing else []
    present = [word for word in control.not_words if word in broken.reason]
    faults += [f"its reason has {', '.join(map(repr, present))}: {broken.reason}"] if present else []
    if not sound.met:
        faults.append(f"the untouched twin is {sound.status}: {sound.reason}")
    if control.caught_by == "reason" and all(word in sound.reason for word in control.words):
        faults.append(f"the untouched twin is given the same warning: {sound.reason}")
    return faults


def _outcome(
    control: Control,
    instrument: str,
    held: bool | None,
    fault: str | None,
    sabotage: Check | None = None,
    twin: Check | None = None,
) -> Outcome:
    return Outcome(
        control=control.name,
        path=control.path,
        required=control.required,
        instrument=instrument,
        held=held,
        fault=fault,
        sabotage=sabotage,
        twin=twin,
    )
