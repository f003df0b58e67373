"""A training as its source sees it, reported to its follower step by step.

The source says what happens (a batch came, a part begins, a loss is there, the step is over); here it becomes the
reading of a step. The clock of a step runs from the follower's release to the step's end on the device, for which the
device is waited for once. What the meter itself does at the end of a step, and what the script does in phases of their
own (evaluation, saving), is in no step's time.

A step that has ended is noted and no more; as soon as the follower's patience is over, or anything else happens, all
that was noted becomes readings and is reported.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lorameter.attach.observer import (
    ErrorGuard,
    NotFollowedError,
    ObserverReply,
    Phase,
    TrainingInfo,
    TrainingObserver,
)
from lorameter.attach.readings import Copied, FinishedStep, Parts, copy_batch, reading_of
from lorameter.records.units import format_count

CPU_TIME_REUSE_S = 1e-3
"""What a follower takes that only writes something down."""


class Steps:
    """Tells one follower of one training. Every call is shielded: it raises nothing of ours, and nothing at all once
    something of ours has failed."""

    def __init__(
        self, follower: TrainingObserver, training: TrainingInfo, device: torch.device, shield: ErrorGuard
    ) -> None:
        self._follower = follower
        self._training = training
        self._device = device if device.type == "cuda" else None
        """That a step's end is waited for on."""
        self._shield = shield
        shield.on_error = self._failed
        self._parts = Parts(device, shield)
        self.during = self._parts.during
        """The parts of the step, by their names."""
        self._number = 0
        self._batches: list[Copied] = []
        self._losses: list[Any] = []
        self._gradient_norm: Any = None
        self._next = ObserverReply()
        self._noted: list[FinishedStep] = []
        """Steps that were not reported yet, the first of which ended a moment after `_reported_s`."""
        self._reported_s = -math.inf
        self._phase: Phase = "train"
        self._watching = contextlib.ExitStack()
        self._watch: Any = None
        """What looks on, and has, if anything did: of steps in a row it is the same."""
        self._open = False
        self.ended = False
        """Whether the training has ended."""
        self._begun_s = self._begun_cpu_s = 0.0

    def run(self, call: Callable[..., Any], *args: Any) -> Any:
        """What a call of the source's own returns, shielded as everything here; None where it fails."""
        return self._shield.run(call, *args)

    @property
    def up(self) -> bool:
        """Whether the training is followed: it has begun, has not ended, and nothing of ours has failed."""
        return self._shield.up and not self.ended

    def begin(self) -> None:
        """The training is before its first step."""
        self._shield.run(self._begin)

    def _begin(self) -> None:
        self._next = self._follower.begin(self._training)
        self._release()

    def batch(self, batch: Any) -> None:
        """The step computes this batch, before it is moved or changed."""
        if self._shield.up:
            self.count(self.copy(batch))

    def copy(self, batch: Any) -> Copied:
        """What counts of a batch, which a later step may compute."""
        begun = time.perf_counter()
        copied = self._shield.run(copy_batch, batch) or Copied()
        self._leave_out(time.perf_counter() - begun)
        return copied

    def count(self, batch: Copied) -> None:
        """The step computes this batch."""
        self._batches.append(batch)

    def begin_backward(self) -> None:
        """A backward pass begins, and the forward pass before it, of which nothing else is seen, has ended."""
        self._shield.run(self._parts.begin_backward)

    def loss(self, loss: Any) -> None:
        """A part of the step's loss; the parts add up. A tensor is read when the step has ended."""
        self._losses.append(_without_graph(loss))

    def gradient_norm(self, norm: Any) -> None:
        """The norm of the gradients that the step updates by."""
        self._gradient_norm = _without_graph(norm)

    @property
    def watch_is_due(self) -> bool:
        """Whether a check was asked for that is not open yet."""
        return self.up and self._next.watch is not None and not self._open

    def open_step(self) -> None:
        """The step's work begins, its data is there; where a check was asked for, it looks on from here."""
        if self._next.watch is not None and self.watch_is_due:
            self._shield.run(self._open_step, self._next.watch)

    def break_off(self) -> None:
        """The step under way will not be ended. Nothing that looks on at it stays on the model."""
        watching, self._watching = self._watching, contextlib.ExitStack()
        self._watch, self._open = None, False
        self._shield.run(watching.__exit__, NotFollowedError, NotFollowedError("the step was broken off"), None)

    def _open_step(self, requirements: Mapping[str, Any]) -> None:
        if self._watch is None:
            self._watch = make_watch(self._training.module, requirements)
        if self._watch is not None:
            self._open = True
            self._watching.enter_context(self._watch)

    def restart(self) -> None:
        """Whatever was before belongs to no step: the clock of the next one starts now."""
        if self._open:
            self.break_off()
        self._shield.run(self._release)

    def _leave_out(self, spent_s: float) -> None:
        self._begun_s += spent_s
        self._begun_cpu_s += spent_s
        self._parts.leave_out(spent_s)

    def end_step(self) -> None:
        """The step is over; this may wait as long as the observer does."""
        if self.up:
            try:
                self._end_step()
            except Exception as error:
                self._shield.stand_aside(error)
        else:  # what is still noted belongs to no step
            self._forget()

    def _end_step(self) -> None:
        if self._device is not None:
            torch.cuda.synchronize(self._device)
        ended_s, ended_cpu_s = time.perf_counter(), time.process_time()
        # What the meter did aside is taken off by the clock, which went on where another process had the CPU meanwhile.
        wall, cpu = ended_s - self._begun_s, max(0.0, ended_cpu_s - self._begun_cpu_s)
        checks = self._close_watch() if self._watch is not None else None
        self._number += 1
        losses, norm = self._losses, self._gradient_norm
        # Read now: a script may go on adding to the tensor that it has shown.
        loss = sum(map(float, losses)) if losses else None
        dtype = losses[-1].dtype if losses and isinstance(losses[-1], torch.Tensor) else None
        borders = self._parts.borders
        self._noted.append(FinishedStep(self._number, wall, cpu, borders, self._batches, loss, dtype, norm, checks))
        if checks is not None or ended_s - self._reported_s >= self._next.flush_interval_s:
            self._report_steps()
        self._release(ended_s, ended_cpu_s)

    def _report_steps(self) -> None:
        """Tell what was noted."""
        noted, self._noted = self._noted, []
        for reading in map(reading_of, noted):
            self._next = self._follower.step(reading)
        self._reported_s = time.perf_counter()

    def _close_watch(self) -> tuple[Any, ...] | None:
        if not self._open:
            self._watch = None
            return None
        self._open = False
        self._watching.close()
        return tuple(self._watch.checks)

    def _release(self, seen_s: float = -math.inf, seen_cpu_s: float = 0.0) -> None:
        """The next step begins. The CPU time that was `seen` a moment ago, at `seen_s`, is taken for that of now: some
        kernels take as long to tell it as a small part of a step."""
        self._forget()
        self._parts.begin()
        now = time.perf_counter()
        spent = now - seen_s
        self._begun_cpu_s = seen_cpu_s + spent if spent < CPU_TIME_REUSE_S else time.process_time()
        self._begun_s = now

    def _forget(self) -> None:
        self._parts.borders, self._batches, self._losses, self._gradient_norm = [], [], [], None

    def phase(self, phase: Phase) -> None:
        """From here on the training does this; when it trains again, the clock of the next step starts."""
        if phase != self._phase:
            self._shield.run(self._enter, phase)

    def _enter(self, phase: Phase) -> None:
        self._report_steps()
        self._phase = phase
        self._follower.phase(phase)
        if phase == "train":
            self._release()

    def end(self, error: BaseException | None, *, seen: bool = True) -> None:
        """The training has ended, as its source has `seen`, or its process has; later calls do nothing."""
        if not self.ended:
            self.ended = True
            self.break_off()
            self._shield.run(self._end, error, seen)

    def _end(self, error: BaseException | None, seen: bool) -> None:
        self._report_steps()
        self._follower.end(error, seen=seen)

    def _failed(self, error: Exception) -> None:
        """Something of ours has failed: the follower learns that it saw no whole training. The training itself goes
        on, so it has not ended."""
        with contextlib.suppress(Exception):
            self._watching.close()
        self._watch = None
        with contextlib.suppress(Exception):  # it may be what has failed
            self._report_steps()
        failure = NotFollowedError(
            f"the meter failed after {format_count(self._number, 'step')}: {type(error).__name__}: {error}"
        )
        failure.__cause__ = error
        self._follower.end(failure)


def make_watch(model: Any, requirements: Mapping[str, Any]) -> Any:
    """What watches a step by kernels_check; None where there is no model.

    Paths about several ranks are left out, so that one that is required is not met: for them all ranks have to watch
    the same step, and the ranks of a script end their warm-up by themselves.
    """
    from kernels_check import watch

    if not isinstance(model, torch.nn.Module):
        return None
    return watch(model, {path: value for path, value in requirements.items() if not path.startswith("ranks.")})


def _without_graph(value: Any) -> Any:
    """A number as it is, and a tensor without what it was computed from, which would stay in memory."""
    return value.detach() if getattr(value, "requires_grad", False) else value
