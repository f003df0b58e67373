"""The instruments beside a step that takes place by itself: opened before it and closed after it, once.

Which one is at work is settled before the step, which cannot be taken again: the spy where a profiler of the program
runs already; names on the host alone where the spy is asked for and the model holds compiled code, into which it would
not follow (see ``spy_beside``). What then turns out to be in the way leaves its evidence untold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Protocol, get_args

import torch
from torch import nn

from kernels_check.check import Evidence, Instrument
from kernels_check.observe.calls import CallRecorder
from kernels_check.observe.dispatch_recorder import DispatchRecorder, blind_to, is_on_cuda
from kernels_check.observe.events import StepProfile, reduce_operators
from kernels_check.observe.instruments import AROUND, INSIDE, CallWatcher, stand_in, told
from kernels_check.observe.live_dispatch_recorder import spied_beside
from kernels_check.observe.module_tree import Model, every_module
from kernels_check.observe.recording import ProfilerRecording, is_recording
from kernels_check.observe.safe_hooks import Shielding

TOLD_BY_A_PROFILE = "the spy does not see which compiled code is entered: take a profile"
LEFT_BEHIND = (
    "the spy was taken off by another thread than that which it is in, and leaves it at the next operator there"
)
_INPUTS: Evidence = "inputs"
"""Seen by hooks, whatever the instrument."""


class Beside(Protocol):
    """One instrument for one step."""

    marks: bool
    """Whether its records name the calls of modules."""

    def opened(self, calls: CallRecorder, shield: Shielding) -> AbstractContextManager[object]:
        """Look on until the end of the block."""

    def told(self, watcher: CallWatcher) -> StepProfile:
        """What it has to tell afterwards."""

    @property
    def left(self) -> str | None:
        """What of it is still in place, and until when."""


def choose(instrument: Instrument, model: Model) -> Beside:
    """The instrument for the step that comes next."""
    if is_recording():
        return _BySpy(in_place_of=AROUND if instrument == "profile" else None)
    if instrument == "profile":
        return _ByProfile()
    return _ByNames() if any(map(_is_compiled, every_module(model))) else _BySpy()


class _ByProfile:
    marks = True
    left = None

    def __init__(self) -> None:
        self._recording = ProfilerRecording()

    def opened(self, calls: CallRecorder, shield: Shielding) -> AbstractContextManager[object]:
        return self._recording.opened()

    def told(self, watcher: CallWatcher) -> StepProfile:
        if self._recording.lasted:
            return self._recording.operators()
        evidence: tuple[Evidence, ...] = get_args(Evidence)
        return replace(reduce_operators([]), untold={one: INSIDE for one in evidence if one != _INPUTS})


class _BySpy:
    marks = False

    def __init__(self, *, in_place_of: str | None = None) -> None:
        self._in_place_of = in_place_of
        self._spy: DispatchRecorder | None = None

    @property
    def left(self) -> str | None:
        return LEFT_BEHIND if self._spy is not None and self._spy.left_behind else None

    @contextmanager
    def opened(self, calls: CallRecorder, shield: Shielding) -> Iterator[None]:
        with spied_beside(calls, shield) as self._spy:
            yield

    def told(self, watcher: CallWatcher) -> StepProfile:
        if self._spy is None:
            raise RuntimeError("the spy was not opened")
        seen = told(self._spy, watcher)
        untold: dict[Evidence, str] = {"compilation": TOLD_BY_A_PROFILE} if self._spy.compiled_calls else {}
        if self._in_place_of is not None:
            return stand_in(seen, self._in_place_of, untold)
        return replace(seen, untold={**seen.untold, **untold})


class _ByNames:
    marks = True
    left = None

    def __init__(self) -> None:
        self._recording = ProfilerRecording(names_alone=True)

    def opened(self, calls: CallRecorder, shield: Shielding) -> AbstractContextManager[object]:
        return self._recording.opened()

    def told(self, watcher: CallWatcher) -> StepProfile:
        nothing = reduce_operators([])
        seen = replace(nothing, blind=blind_to(nothing, on_cuda=is_on_cuda(watcher.model), compiled=True))
        if not self._recording.lasted:
            return replace(seen, untold={"compilation": INSIDE})
        return replace(seen, compiler=self._recording.entered())


def _is_compiled(module: nn.Module) -> bool:
    forward: Callable[..., Any] | None = getattr(module, "forward", None)
    return (
        module._compiled_call_impl is not None
        or hasattr(forward, "_torchdynamo_orig_callable")
        or isinstance(module, torch._dynamo.OptimizedModule)
    )
