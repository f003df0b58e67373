"""The steps of a loop that names them: `for batch in steps(loader)`, or `with step()`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lorameter.attach.attachment import this_process
from lorameter.attach.error_guard import ErrorGuard
from lorameter.attach.identity import count_parameters, device_of, rank_of
from lorameter.attach.model_hooks import ModelHooks
from lorameter.attach.observer import Phase, TrainingInfo, TrainingObserver, weakly
from lorameter.attach.optimizer import StopTraining
from lorameter.attach.patches import uncompiled
from lorameter.attach.steps import Steps

Batch = TypeVar("Batch")


class LoopSource:
    """Sees the steps of one loop."""

    def __init__(
        self, model: Any, make: Callable[[], TrainingObserver] | None, required: Mapping[str, Any] | None = None
    ) -> None:
        self._model = weakly(model)
        self._make = make
        self._required = dict(required or {})
        self._steps: Steps | None = None
        self._sight: ModelHooks | None = None
        self._handles: list[Any] = []
        self._begun = False
        self._given_loss = False

    def steps(self, batches: Iterable[Batch], accumulation: int) -> Iterator[Batch]:
        """The batches; `accumulation` of them are a step, and what is left over at the end is none."""
        steps = self._begin(accumulation, counts=False)
        if steps is None or not steps.go_on:
            if steps is None:
                yield from batches
            return
        iterator, taken = iter(batches), 0
        steps.restart()
        try:
            self._look(True)
            while True:
                with steps.during["data"]:
                    batch = next(iterator, _END)
                if batch is _END:
                    break
                steps.batch(batch)
                if taken == 0:
                    steps.open_step()
                yield batch  # type: ignore[misc]
                taken = (taken + 1) % accumulation
                if taken == 0 and not self._end_step(steps):
                    return
        finally:
            self._look(False)
            steps.break_off()

    @contextlib.contextmanager
    def step(self, batch: Any) -> Iterator[None]:
        """The block is a step; what lies between two of them is in none. Raises `StopTraining` where the follower
        wants no further one; a block that fails is no step."""
        steps = self._begin(None, counts=batch is None)
        if steps is None:
            yield
            return
        if not steps.go_on:
            self.end(None)
            raise StopTraining
        steps.restart()
        if batch is not None:
            steps.batch(batch)
        steps.open_step()
        self._look(True)
        try:
            yield
        except BaseException:
            steps.break_off()
            raise
        finally:
            self._look(False)
        self._end_step(steps)

    def _look(self, within: bool) -> None:
        """What happens from here on is within a step, or not."""
        if self._sight is not None:
            self._sight.within = within

    @contextlib.contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """The block does this and no training; it is in no step's time."""
        if self._steps is not None:
            self._steps.phase(phase)
        try:
            yield
        finally:
            if self._steps is not None:
                self._steps.phase("train")

    def loss(self, loss: Any) -> None:
        """A part of the step's loss, in place of what the model shows of it."""
        if self._steps is not None:
            self._given_loss = True
            self._steps.loss(loss)

    def end(self, error: BaseException | None) -> None:
        """The training has come to its end."""
        while self._handles:
            self._handles.pop().remove()
        if self._sight is not None:
            self._sight.end()
        if self._steps is not None:
            self._steps.end(error)

    def _begin(self, accumulation: int | None, *, counts: bool) -> Steps | None:
        """The steps of this training, which begins with the first call; `counts`: nobody else sees its batches."""
        if self._begun:
            return self._steps
        self._begun = True
        self._steps = ErrorGuard().run(self._follow, accumulation, counts)
        return self._steps

    def _follow(self, accumulation: int | None, counts: bool) -> Steps | None:
        rank, ranks = rank_of()
        model = None if self._model is None else self._model()
        trainable, total = count_parameters(model)
        training = TrainingInfo(
            source="loop",
            model=self._model,
            planned_steps=None,
            trainable_parameters=trainable,
            total_parameters=total,
            accumulation=accumulation,
            rank=rank,
            ranks=ranks,
            required=self._required,
        )
        steps = this_process().begin(self, training, device_of(model), self._make)
        if steps is not None:
            self._sight = ModelHooks(steps, batches=counts)
            self._sight.within = False
            self._see_updates(self._sight, steps)
        return steps

    def _see_updates(self, sight: ModelHooks, steps: Steps) -> None:
        """Every optimizer's update within a step is a part of it. Where one is compiled, the hook is nothing."""
        compiling = torch.compiler.is_compiling

        def hook_of(call: Callable[[], None]) -> Callable[..., None]:
            call = uncompiled(call)

            def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
                if not compiling() and sight.within:
                    call()

            return hook

        self._handles = [
            register_optimizer_step_pre_hook(hook_of(steps.during["optimizer"].begin)),
            register_optimizer_step_post_hook(hook_of(steps.during["optimizer"].end)),
        ]

    def _end_step(self, steps: Steps) -> bool:
        """Whether there is to be another."""
        if self._sight is not None:
            steps.run(self._sight.end_step, not self._given_loss)
        self._given_loss = False
        return steps.end_step()


_END = object()
