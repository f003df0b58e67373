"""The interface of a training's observer, which receives each step and replies with a request; and the error guard.

Steps come from different sources: the callbacks of a Trainer, a loop that names its steps, or the time between two
updates of an optimizer. Observers differ as well: one writes a run, one waits for its turn among other scripts. A
step's time begins when the observer returns and ends when the step has ended on the device, so whatever an observer
does, or waits for, is in no step's time.

The meter can do no harm to the user's training. Its first error is printed once, on the standard error that the process
was started with, and from then on nothing of the meter is called. The training continues, and the observer learns that
it was not followed to its end, so that its run is no pass. An exception that is no `Exception`, such as `SystemExit`,
is passed on.
"""

from __future__ import annotations

import contextlib
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, ParamSpec, Protocol, TypeVar

from kernels_check.terminal import escape_control_chars
from lorameter.errors import redact, said_by

Source = Literal["trainer", "loop", "optimizer"]
"""Where steps are seen: transformers' Trainer · a loop that names its steps · between two updates of an optimizer."""
Phase = Literal["train", "evaluate", "save"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingInfo:
    """Facts of a training before its first step. It holds a weak reference to the model only."""

    source: Source
    model: weakref.ref[Any] | None = None
    """To an ``nn.Module``; None where the source does not see it."""
    planned_steps: int | None = None
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    accumulation: int | None = None
    """Forward and backward passes in a step."""
    rank: int = 0
    ranks: int = 1
    required: Mapping[str, Any] = field(default_factory=dict)
    """Paths of kernels_check that the script itself requires of a step."""

    @property
    def module(self) -> Any:
        """The model; None if there is none, or no longer."""
        return None if self.model is None else self.model()

    @property
    def counts(self) -> dict[str, float]:
        """Parameters, accumulation and ranks as values of a record, as far as they are known."""
        names = ("trainable_parameters", "total_parameters", "accumulation", "ranks")
        return {name: float(count) for name in names if (count := getattr(self, name)) is not None}


def weakly(model: Any) -> weakref.ref[Any] | None:
    """A weak reference to a model, as a `TrainingInfo` holds it; None for anything that cannot be referenced so."""
    try:
        return weakref.ref(model)
    except TypeError:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReading:
    """What one step showed; None for what this source cannot see."""

    number: int
    """From 1."""
    step_time_s: float
    """From the observer's return to the step's end on the device; the wait for data is in it."""
    cpu_time_s: float
    """CPU time of all threads of the process in this time."""
    data_time_s: float | None = None
    forward_time_s: float | None = None
    backward_time_s: float | None = None
    optimizer_time_s: float | None = None
    sequences: int | None = None
    real_tokens: int | None = None
    """Tokens that are no padding."""
    padded_tokens: int | None = None
    """All positions, padding included."""
    loss_tokens: int | None = None
    loss: float | None = None
    loss_dtype: str | None = None
    """As torch names it, without `torch.`: of the loss that the backward pass began with."""
    gradient_norm: float | None = None
    conventions: tuple[str, ...] = ()
    """How its tokens were counted, in words."""
    checks: tuple[Any, ...] | None = None
    """What ``kernels_check`` found; None unless it watched this step."""

    @property
    def padding_tokens(self) -> int | None:
        """Positions that are padding."""
        known = self.padded_tokens is not None and self.real_tokens is not None
        return self.padded_tokens - self.real_tokens if known else None  # type: ignore[operator]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObserverReply:
    """What an observer requests of the next step."""

    watch: Mapping[str, Any] | None = None
    """What ``kernels_check`` is to require of it; None: not watched, and ``{}``: watched, nothing required."""
    flush_interval_s: float = 0.0
    """Seconds that steps may wait before they are reported. Reporting many steps at once costs each of them a part of
    what it costs alone, and a process that is killed takes them along."""


class TrainingObserver(Protocol):
    """Follows one training; it may block in ``begin`` and ``step``, which is in no step's time."""

    def begin(self, training: TrainingInfo) -> ObserverReply:
        """The training is before its first step."""

    def step(self, reading: StepReading) -> ObserverReply:
        """A step has ended, as long ago at most as its `flush_interval_s` allows."""

    def phase(self, phase: Phase) -> None:
        """From here on the training does this."""

    def end(self, error: BaseException | None, *, seen: bool = True) -> None:
        """The training has ended, by itself or by an error; unless it was `seen`, only the process has."""


P = ParamSpec("P")
T = TypeVar("T")


class NotFollowedError(Exception):
    """The training was not followed to its end, for a reason of the meter's own."""


class ErrorGuard:
    """Calls functions of the meter, in the process that made it and until the first error. Not thread-safe."""

    def __init__(self) -> None:
        self.up = True
        """Whether functions are still called: not after an error, and not in a fork of the process."""
        self.on_error: Callable[[Exception], object] = lambda error: None
        """Is called once, after the error was printed."""
        os.register_at_fork(after_in_child=self._stop)

    def _stop(self) -> None:
        self.up = False

    def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What the call returns; None where it is not called any more, or fails."""
        if not self.up:
            return None
        try:
            return call(*args, **kwargs)
        except Exception as error:
            self.up = False
            what = "the measurement failed and has stopped; the training continues without it"
            say(f"{'this training is not followed' if isinstance(error, NotFollowedError) else what}: {said_by(error)}")
            with contextlib.suppress(Exception):
                self.on_error(error)
            return None


def say(text: str) -> None:
    """A line on the standard error that the process was started with, whatever the script has put in its place."""
    with contextlib.suppress(Exception):
        if sys.__stderr__ is not None:
            print(escape_control_chars(f"lorameter: {redact(text)}"), file=sys.__stderr__, flush=True)
