"""Who follows a training that somebody else runs is told of each step, and says what comes next.

Steps come from different sources: the callbacks of a Trainer, a loop that names its steps, or what lies between
two updates of an optimizer. Followers differ as well: one writes down what it is told, one waits for its turn beside
other scripts. The two meet here. A step's time begins when the follower lets go of it and ends when the step has ended
on the device, so that whatever a follower does, or waits for, is in no step's time.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Source = Literal["trainer", "loop", "optimizer"]
"""Where steps are seen: transformers' Trainer · a loop that names its steps · between two updates of an optimizer."""
Phase = Literal["train", "evaluate", "save"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingInfo:
    """What is known of a training before its first step. It keeps nothing of the script's alive."""

    source: Source
    model: weakref.ref[Any] | None
    """To an ``nn.Module``; None where the source does not see it."""
    planned_steps: int | None
    trainable_parameters: int | None
    total_parameters: int | None
    accumulation: int | None
    """Forward and backward passes in a step."""
    rank: int = 0
    ranks: int = 1
    required: Mapping[str, Any] = field(default_factory=dict)
    """Paths of kernels_check that the script itself says a step must have."""

    @property
    def module(self) -> Any:
        """The model; None if there is none, or no longer."""
        return None if self.model is None else self.model()


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
    """From the follower's release to the step's end on the device; the wait for data is in it."""
    cpu_time_s: float
    """Of all threads of the process, meanwhile."""
    data_time_s: float | None = None
    forward_time_s: float | None = None
    backward_time_s: float | None = None
    optimizer_time_s: float | None = None
    sequences: int | None = None
    real_tokens: int | None = None
    """Tokens that are no padding."""
    padded_tokens: int | None = None
    """All positions of the batch, padding included."""
    loss_tokens: int | None = None
    """Tokens that the loss is over."""
    loss: float | None = None
    loss_dtype: str | None = None
    """As torch names it, without `torch.`: of the loss that the backward pass began with."""
    gradient_norm: float | None = None
    conventions: tuple[str, ...] = ()
    """How its tokens were counted, in words."""
    checks: tuple[Any, ...] | None = None
    """What ``kernels_check`` found; None unless it watched this step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObserverReply:
    """What a follower wants of the step to come."""

    go_on: bool = True
    """False: no further step; the training is asked to end as if it had come to its own end."""
    watch: Mapping[str, Any] | None = None
    """What ``kernels_check`` is to require of it; None: not watched, and ``{}``: watched, nothing required."""
    flush_interval_s: float = 0.0
    """So long what steps showed may wait until it is told, as long as nothing else happens. What is told of many steps
    in one go costs each of them a part of what it costs alone, and a process that is killed takes it along. Of several
    answers the last one counts, so an observer with an interval asks for nothing else."""


class TrainingObserver(Protocol):
    """Follows one training; it may block in ``begin`` and ``step``, which is in no step's time."""

    def begin(self, training: TrainingInfo) -> ObserverReply:
        """The training stands before its first step."""

    def step(self, reading: StepReading) -> ObserverReply:
        """A step has ended, as long ago at most as its `flush_interval_s` allows."""

    def phase(self, phase: Phase) -> None:
        """From here on the training does this."""

    def so_far(self, readings: Sequence[StepReading]) -> Mapping[str, float]:
        """What it knows beside what steps show, by names of a record; the `readings` are those since it was last asked
        and have been told of."""

    def end(self, error: BaseException | None, *, seen: bool = True) -> None:
        """The training has come to its end, by itself or by an error; unless it was `seen`, only the process has."""
