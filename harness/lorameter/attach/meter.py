"""The meter that a script imports: a callback of transformers' Trainer, and the same for any loop.

    trainer = Trainer(..., callbacks=[Meter()])                  for batch in Meter(model).steps(loader):

What it measures becomes a run on disk, as `lorameter run` leaves one, and its report is printed at the end. A training
that is wrapped (`lorameter wrap`), or that takes turns with others, is reported to those in its place.

Callbacks of transformers' Trainer say where a step begins and ends, and what else the Trainer does. They do not say
where its time goes: for that the methods that a step consists of (`get_batch_samples`, `training_step`,
`compute_loss`) are timed on the one trainer at hand, from the beginning of its training to its end. What a subclass or
a library has put in their place is what is called.

The Trainer fetches the batches of a step before it says that the step begins, and logs, evaluates and saves after it
has said that it has ended. So the wait for data is timed by itself, and evaluation and saving are phases of their own.
"""

from __future__ import annotations

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

from lorameter.attach.attachment import UnendedError, follow, named_follower
from lorameter.attach.environment import ENV_FOLLOWER
from lorameter.attach.loop import LoopSource
from lorameter.attach.observer import ErrorGuard, TrainingObserver, without_frames
from lorameter.attach.steps import Steps
from lorameter.records.store import ENV_RUNS

TIMED = ("get_batch_samples", "training_step", "compute_loss", "_get_grad_norm")
"""Methods of a Trainer that are timed or looked at; one that is not there leaves what it shows unknown."""


class TrainerSource(TrainerCallback):
    """Sees the steps of one Trainer, by whose events it is called."""

    def __init__(
        self,
        make: Callable[[], TrainingObserver] | None = None,
        *,
        required: Mapping[str, Any] | None = None,
    ) -> None:
        """Nothing is attached yet.

        Args:
            make: makes the follower; None: the one that the environment names.
            required: paths of kernels_check that a step must have.
        """
        self._make = make
        self._required = dict(required or {})
        self._steps: Steps | None = None
        self._trainer_ref: Callable[[], Any] = lambda: None
        self._failed: BaseException | None = None
        self._replaced: list[str] = []
        self._micro = False
        """Whether the Trainer is inside a pass of training, and not of evaluation."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Everything is set up, and no batch has been fetched."""
        self._release_trainer()
        self._steps = ErrorGuard().run(self._begin, args, state, kwargs.get("model"))

    def _begin(self, args: Any, state: Any, model: Any) -> Steps | None:
        steps = follow(
            self,
            "trainer",
            model,
            self._make,
            planned_steps=state.max_steps or None,
            accumulation=args.gradient_accumulation_steps,
            required=self._required,
        )
        if steps is not None:
            trainer = find_trainer(state)
            if trainer is not None:
                self._trainer_ref = weakref.ref(trainer)
                self._time_methods(trainer)
            if getattr(args, "eval_on_start", False):
                steps.phase("evaluate")
        return steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The batches of a step are there."""
        if self._steps is not None:
            self._steps.phase("train")
            self._steps.open_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are there and clipped."""
        if self._steps is not None:
            self._steps.during["optimizer"].begin()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The weights are updated."""
        if self._steps is not None:
            self._steps.during["optimizer"].end()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is over. The flow of the Trainer has decided by now what it does next."""
        if self._steps is None:
            return
        self._steps.end_step()
        self._enter_next(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An epoch is over, after which the Trainer may evaluate or save."""
        self._enter_next(control)

    def _enter_next(self, control: Any) -> None:
        """What the Trainer has decided to do before the next step."""
        if self._steps is not None and (control.should_evaluate or control.should_save):
            self._steps.phase("evaluate" if control.should_evaluate else "save")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A batch of an evaluation is done; the evaluation may not have been announced."""
        if self._steps is not None:
            self._steps.phase("evaluate")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation is over; whether its result is worth saving is decided after this."""
        if self._steps is not None:
            saves = control.should_save or getattr(args.save_strategy, "value", args.save_strategy) == "best"
            self._steps.phase("save" if saves else "train")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Saving is over."""
        if self._steps is not None:
            self._steps.phase("train")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Training has ended."""
        self._release_trainer()
        if self._steps is not None:
            self._steps.end(None)

    def unended(self) -> BaseException:
        """The error of a training that did not end: the last one of its steps."""
        return self._failed or UnendedError("the process has ended before its training did")

    def _time_methods(self, trainer: Any) -> None:
        """Time the methods of this trainer, of no other, until it is released."""
        for name in TIMED:
            original = getattr(trainer, name, None)
            if callable(original):
                timed = functools.wraps(original)(functools.partial(getattr(self, f"_{name.strip('_')}"), original))
                setattr(trainer, name, timed)
                self._replaced.append(name)

    def _release_trainer(self) -> None:
        trainer = self._trainer_ref()
        while self._replaced:
            name = self._replaced.pop()
            if trainer is not None:
                vars(trainer).pop(name, None)
        self._trainer_ref = lambda: None

    def _get_batch_samples(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        steps = self._steps
        if steps is None:
            return original(*args, **kwargs)
        steps.phase("train")
        with steps.during["data"]:
            found = original(*args, **kwargs)
        for batch in found[0] if isinstance(found, tuple) and isinstance(found[0], list) else ():
            steps.batch(batch)
        return found

    def _training_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        steps = self._steps
        if steps is None:
            return original(*args, **kwargs)
        self._micro = True
        try:
            loss = original(*args, **kwargs)
        except BaseException as error:
            self._failed = without_frames(error)
            steps.break_off()
            raise
        finally:
            self._micro = False
            steps.during["backward"].end()
        steps.loss(loss)
        return loss

    def _compute_loss(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        steps = self._steps
        if steps is None or not self._micro:
            return original(*args, **kwargs)
        with steps.during["forward"]:
            found = original(*args, **kwargs)
        steps.during["backward"].begin()
        return found

    def _get_grad_norm(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        norm = original(*args, **kwargs)
        if self._steps is not None and norm is not None:
            self._steps.gradient_norm(norm)
        return norm


def find_trainer(state: Any) -> Any:
    """The Trainer whose callback is being called; None where there is none.

    A callback is given the arguments, the state and the model, and not the Trainer. The Trainer is the `self` of a
    frame that called, and its state is this one.
    """
    frame: Any = sys._getframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if owner is not None and getattr(owner, "state", None) is state and callable(getattr(owner, "log", None)):
            return owner
        frame = frame.f_back
    return None


Batch = TypeVar("Batch")


class Meter(TrainerSource):
    """Follows one training of this process, the first that begins: a Trainer's, as its callback, or a loop's. It
    changes nothing of it, and fails by itself only."""

    def __init__(
        self,
        model: Any = None,
        *,
        runs_dir: str | Path | None = None,
        require: Mapping[str, Any] | None = None,
        report: bool = True,
    ) -> None:
        """Nothing is measured before the training begins.

        Args:
            model: of a loop: the module that is called; what is not given is not seen (a Trainer gives its own).
            runs_dir: where the run is written; None: $LORAMETER_RUNS, else ./.lorameter/runs.
            require: paths of kernels_check that a step must have, which is looked at after the warm-up.
            report: whether the report is printed when the training has ended.
        """
        named = runs_dir or os.environ.get(ENV_RUNS)
        self._runs_dir = None if named is None else Path(named).absolute()  # a script may change its folder
        required = dict(require or {})
        self._report = report
        super().__init__(self._make_follower, required=required)
        self._loop = LoopSource(model, self._make_follower, required)

    def _make_follower(self) -> TrainingObserver:
        if os.environ.get(ENV_FOLLOWER):
            return named_follower()
        from lorameter.attach.writer import Writer

        return Writer(runs_dir=self._runs_dir, report=self._report)

    def steps(self, batches: Iterable[Batch], *, accumulation: int = 1) -> Iterator[Batch]:
        """The batches of a loader, for a loop that updates once every `accumulation` of them: that is a step.

        The wait for a batch is measured separately. It may be called again, as once an epoch.
        """
        return self._loop.steps(batches, accumulation)

    def evaluating(self) -> AbstractContextManager[None]:
        """The block evaluates: it is in no step's time, and its peak of memory is one of its own."""
        return self._loop.phase("evaluate")

    def saving(self) -> AbstractContextManager[None]:
        """The block saves: as `evaluating`."""
        return self._loop.phase("save")

    def end(self, error: BaseException | None = None) -> None:
        """The training of a loop has ended; else it ends with the process."""
        self._loop.end(error)

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(error)


def add_meter(trainer: Any) -> None:
    """Add a meter, unless the script has given it one."""
    if not any(isinstance(callback, Meter) for callback in trainer.callback_handler.callbacks):
        trainer.add_callback(Meter())
