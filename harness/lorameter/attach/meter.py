"""The meter that a script imports: a callback for transformers' Trainer, and an equivalent for any loop.

    trainer = Trainer(..., callbacks=[Meter()])                  for batch in Meter(model).steps(loader):

It writes its measurements as a run, like `lorameter run`, and prints the report at the end. A training that is wrapped
(`lorameter wrap`), or that takes turns with others, is reported to the parent process instead.

Callbacks of transformers' Trainer mark the start and end of steps and the other work of the Trainer. The Trainer
fetches the batches of a step before it reports the start of the step, so the meter also times its `get_batch_samples`,
on this trainer only, from the start of its training to its end. The Trainer logs, evaluates and saves after it has
reported the end of a step: evaluation and saving are separate phases.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from transformers import TrainerCallback

from lorameter.attach.launch import ENV_FOLLOWER
from lorameter.attach.observer import ErrorGuard, Phase, Source, TrainingObserver, weak_reference
from lorameter.attach.sources import named_observer, this_process
from lorameter.attach.steps import Steps
from lorameter.records.store import ENV_RUNS

BATCHES = "get_batch_samples"
"""The Trainer method that fetches the batches of a step; without it, the wait for data and the tokens are unknown."""


Batch = TypeVar("Batch")
_END = object()


class Meter(TrainerCallback):
    """Measures one training of this process, the first that begins: a Trainer's, as its callback, or a loop's. It does
    not change the training, and an error of the meter does not end it."""

    def __init__(
        self,
        model: Any = None,
        *,
        runs_dir: str | Path | None = None,
        require: Mapping[str, Any] | None = None,
        report: bool = True,
    ) -> None:
        """Measures nothing before the training begins.

        Args:
            model: for a loop: the module that is called; without it the model is unknown (a Trainer provides its own).
            runs_dir: where the run is written; None: $LORAMETER_RUNS, else ./.lorameter/runs.
            require: kernels_check paths that a step must have, checked after the warm-up.
            report: whether the report is printed when the training has ended.
        """
        named = runs_dir or os.environ.get(ENV_RUNS)
        self._runs_dir = None if named is None else Path(named).absolute()  # a script may change its working folder
        self._report = report
        self._required = dict(require or {})
        self._model = weak_reference(model)
        self._steps: Steps | None = None
        self._begun = False
        """Whether the training of a loop has begun."""
        self._trainer: Callable[[], Any] = lambda: None

    def _make(self) -> TrainingObserver:
        if os.environ.get(ENV_FOLLOWER):
            return named_observer()
        from lorameter.attach.writer import Writer

        return Writer(runs_dir=self._runs_dir, report=self._report)

    def _follow(self, kind: Source, model: Any, **facts: Any) -> Steps | None:
        return this_process().begin(self, kind, model, self._make, required=self._required, **facts)

    # --- a Trainer ----------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called after the setup, before the first batch is fetched."""
        self.detach()
        self._steps = ErrorGuard().run(self._begin, args, state, kwargs.get("model"))

    def _begin(self, args: Any, state: Any, model: Any) -> Steps | None:
        facts = {"planned_steps": state.max_steps or None, "accumulation": args.gradient_accumulation_steps}
        steps = self._follow("trainer", model, **facts)
        if steps is not None:
            self.attach(steps, find_trainer(state))
            if getattr(args, "eval_on_start", False):
                steps.phase("evaluate")
        return steps

    def attach(self, steps: Steps, trainer: Any) -> None:
        """Time how this trainer fetches its batches, until `detach`."""
        fetch = getattr(trainer, BATCHES, None)
        if callable(fetch):
            self._trainer = weakref.ref(trainer)
            setattr(trainer, BATCHES, functools.wraps(fetch)(functools.partial(_fetch_batches, steps, fetch)))

    def detach(self) -> None:
        """Restore the trainer."""
        trainer = self._trainer()
        if trainer is not None:
            vars(trainer).pop(BATCHES, None)

    def _enter(self, phase: Phase) -> None:
        if self._steps is not None:
            self._steps.phase(phase)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called when the batches of a step are loaded."""
        if self._steps is not None:
            self._steps.phase("train")
            self._steps.open_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called at the end of a step. By now the Trainer has decided what it does next."""
        if self._steps is not None:
            self._steps.end_step()
            self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called at the end of an epoch, after which the Trainer may evaluate or save."""
        if control.should_evaluate or control.should_save:
            self._enter("evaluate" if control.should_evaluate else "save")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called after a batch of an evaluation, whose start may not have been reported."""
        self._enter("evaluate")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called after an evaluation; the Trainer decides after this whether to save."""
        saves = control.should_save or getattr(args.save_strategy, "value", args.save_strategy) == "best"
        self._enter("save" if saves else "train")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called after saving."""
        self._enter("train")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called at the end of training."""
        self.detach()
        self.end()

    # --- a loop -------------------------------------------------------------------------------------------------------

    def steps(self, batches: Iterable[Batch], *, accumulation: int = 1) -> Iterator[Batch]:
        """Iterate over the batches of a loader, for a loop that updates once every `accumulation` batches: each such
        group is a step, and an incomplete group at the end is not a step.

        The wait for a batch is measured separately. Call it again for every epoch.
        """
        if not self._begun:
            self._begun = True
            model = None if self._model is None else self._model()
            self._steps = ErrorGuard().run(self._follow, "loop", model, accumulation=accumulation)
        if self._steps is None:
            yield from batches
            return
        steps, iterator, taken = self._steps, iter(batches), 0
        steps.restart()
        steps.within = True
        try:
            while True:
                steps.begin_part("data")
                batch = next(iterator, _END)
                steps.end_part("data")
                if batch is _END:
                    break
                steps.batch(batch)
                if taken == 0:
                    steps.open_step()
                yield batch  # type: ignore[misc]
                taken = (taken + 1) % accumulation
                if taken == 0:
                    steps.end_step()
        finally:
            steps.within = False
            steps.abandon_step()

    def evaluating(self) -> AbstractContextManager[None]:
        """Mark the block as evaluation: no step's time includes it, and it has its own memory peak."""
        return self._during("evaluate")

    def saving(self) -> AbstractContextManager[None]:
        """Mark the block as saving, like `evaluating`."""
        return self._during("save")

    @contextlib.contextmanager
    def _during(self, phase: Phase) -> Iterator[None]:
        self._enter(phase)
        try:
            yield
        finally:
            self._enter("train")

    def end(self, error: BaseException | None = None) -> None:
        """End the training; without this call it ends with the process."""
        if self._steps is not None:
            self._steps.end(error)

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(error)


def _fetch_batches(steps: Steps, fetch: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Fetch the batches of a step, and time the wait for them."""
    steps.phase("train")
    steps.begin_part("data")
    found = fetch(*args, **kwargs)
    steps.end_part("data")
    for batch in found[0] if isinstance(found, tuple) and isinstance(found[0], list) else ():
        steps.batch(batch)
    return found


def find_trainer(state: Any) -> Any:
    """The Trainer whose callback is being called; None if there is none.

    A callback receives the arguments, the state and the model, but not the Trainer. The Trainer is the `self` of a
    calling frame with this state.
    """
    frame: Any = sys._getframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if owner is not None and getattr(owner, "state", None) is state and callable(getattr(owner, "log", None)):
            return owner
        frame = frame.f_back
    return None


def add_meter(trainer: Any) -> None:
    """Add a meter to a Trainer, unless the script has added one."""
    if not any(isinstance(callback, Meter) for callback in trainer.callback_handler.callbacks):
        trainer.add_callback(Meter())
