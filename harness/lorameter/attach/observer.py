"""The interface of a training's observer, which receives each step and replies with requests, and the error guard.

Steps come from different sources: the callbacks of a Trainer, a loop that marks its steps, or the time between two
updates of an optimizer. There are different observers: one writes a run, another waits for its turn among other
scripts. A step's time begins when the observer returns and ends when the step has ended on the device, so it excludes
the work and waits of the observer.

An error of the meter never stops the user's training. Its first error is printed once, on the original standard error
of the process, and from then on the meter is not called. The training continues, and the observer is informed that it
was not measured to its end, so that its run does not pass. Exceptions that are not an `Exception`, such as
`SystemExit`, propagate.
"""

from __future__ import annotations

import contextlib
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, ParamSpec, Protocol, TypeVar

import msgspec

from lorameter.errors import format_error, redact
from lorameter.terminal import escape_control_chars

Source = Literal["trainer", "loop", "optimizer"]
"""Source of the steps: transformers' Trainer · a loop that marks its steps · the time between two optimizer updates."""
Phase = Literal["train", "evaluate", "save"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingInfo:
    """Facts about a training before its first step. It holds only a weak reference to the model."""

    source: Source
    model: weakref.ref[Any] | None = None
    """Reference to an ``nn.Module``; None if the source does not know it."""
    device: str = "cpu"
    """The torch device of its parameters."""
    planned_steps: int | None = None
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    accumulation: int | None = None
    """Forward and backward passes in a step."""
    rank: int = 0
    ranks: int = 1
    required: Mapping[str, Any] = field(default_factory=dict)
    """kernels_check paths that the script itself requires of a step."""

    @property
    def module(self) -> Any:
        """The model; None if there is none, or if it no longer exists."""
        return None if self.model is None else self.model()

    @property
    def counts(self) -> dict[str, float]:
        """Parameters, accumulation and ranks as values of a record, as far as known."""
        names = ("trainable_parameters", "total_parameters", "accumulation", "ranks")
        return {name: float(count) for name in names if (count := getattr(self, name)) is not None}


class StepReading(msgspec.Struct, frozen=True, kw_only=True):
    """The measurements of one step; a value is None if this source cannot observe it."""

    number: int
    """Number of the step, from 1."""
    step_time_s: float
    """Time from the observer's return to the step's end on the device, including the wait for data."""
    cpu_time_s: float
    """CPU time of all threads of the process in this time."""
    data_time_s: float | None = None
    forward_time_s: float | None = None
    backward_time_s: float | None = None
    optimizer_time_s: float | None = None
    sequences: int | None = None
    real_tokens: int | None = None
    """Tokens that are not padding."""
    padded_tokens: int | None = None
    """All positions, including padding."""
    loss: float | None = None
    loss_dtype: str | None = None
    """Dtype of the loss from which the backward pass started, torch's name without `torch.`."""
    gradient_norm: float | None = None
    conventions: tuple[str, ...] = ()
    """Descriptions of how its tokens were counted."""
    checks: tuple[Any, ...] | None = None
    """Checks of ``kernels_check``; None unless it watched this step."""

    @property
    def padding_tokens(self) -> int | None:
        """Positions that are padding."""
        known = self.padded_tokens is not None and self.real_tokens is not None
        return self.padded_tokens - self.real_tokens if known else None  # type: ignore[operator]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObserverReply:
    """Requests of an observer for the next step."""

    watch: Mapping[str, Any] | None = None
    """Requirements for ``kernels_check``; None: do not watch the step; ``{}``: watch it without requirements."""
    flush_interval_s: float = 0.0
    """Maximum seconds before steps are reported. Reporting many steps at once is cheaper per step, but a killed process
    loses unreported steps."""


class TrainingObserver(Protocol):
    """Observes one training. ``begin`` and ``step`` may block: the time of a step excludes their work and waits."""

    def begin(self, training: TrainingInfo) -> ObserverReply:
        """Called before the first step of the training."""

    def step(self, reading: StepReading) -> ObserverReply:
        """Called after a step, delayed by at most the `flush_interval_s`."""

    def phase(self, phase: Phase) -> None:
        """Called when the training enters a phase."""

    def end(self, error: BaseException | None, *, seen: bool = True) -> None:
        """Called when the training has ended, regularly or by an error. `seen` is false if the end was inferred from
        the end of the process or from another training."""


P = ParamSpec("P")
T = TypeVar("T")


class NotMeasuredError(Exception):
    """Raised if the meter, not the training, ends the measurement early."""


class UnendedError(NotMeasuredError):
    """Raised if a training has not ended."""


class ErrorGuard:
    """Calls functions of the meter, in the process that created it and until the first error. Not thread-safe."""

    def __init__(self, on_error: Callable[[Exception], object] = lambda error: None) -> None:
        """`on_error` is called once, after the error was printed."""
        self.is_working = True
        """Whether functions are still called: false after an error, and in a fork of the process."""
        self._on_error = on_error
        os.register_at_fork(after_in_child=self._stop)

    def _stop(self) -> None:
        self.is_working = False

    def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """The result of the call; None if calls have stopped, or if it fails."""
        if not self.is_working:
            return None
        try:
            return call(*args, **kwargs)
        except Exception as error:
            self.is_working = False
            failed = "the measurement failed and has stopped; the training continues without it"
            what = "this training is not measured" if isinstance(error, NotMeasuredError) else failed
            print_notice(f"{what}: {format_error(error)}")
            with contextlib.suppress(Exception):
                self._on_error(error)
            return None


def print_notice(text: str) -> None:
    """Print a line on the original standard error of the process, even if the script has replaced it."""
    with contextlib.suppress(Exception):
        if sys.__stderr__ is not None:
            print(escape_control_chars(f"lorameter: {redact(text)}"), file=sys.__stderr__, flush=True)
