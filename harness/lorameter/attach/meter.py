"""The meter that a script imports: a callback for transformers' Trainer, and an equivalent for any loop.

    trainer = Trainer(..., callbacks=[Meter()])                  for batch in Meter(model).steps(loader):

It writes its measurements as a run, like `lorameter run`, and prints the report at the end. A training that is wrapped
(`lorameter wrap`), or that takes turns with others, is reported to the parent process instead.

Callbacks of transformers' Trainer mark the start and end of steps and the other work of the Trainer. The Trainer logs,
evaluates and saves after it has reported the end of a step: evaluation and saving are separate phases.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from transformers import TrainerCallback

from lorameter.attach.observer import ErrorGuard, Phase, Source
from lorameter.attach.sources import this_process
from lorameter.attach.steps import Steps
from lorameter.records.store import ENV_RUNS

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
        folder = None if named is None else Path(named).absolute()  # a script may change its working folder
        self._options = {"runs_dir": folder, "report": report}
        self._required = dict(require or {})
        self._model = None if model is None else weakref.ref(model)
        self._steps: Steps | None = None

    def _begin(self, kind: Source, model: Any, **facts: Any) -> None:
        """Begin or continue to measure the training, unless another one is measured."""
        self._steps = ErrorGuard().run(
            this_process().begin, self, kind, model, options=self._options, required=self._required, **facts
        )

    # --- a Trainer ----------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called after the setup, before the first batch is fetched."""
        planned, accumulation = state.max_steps or None, args.gradient_accumulation_steps
        self._begin("trainer", kwargs.get("model"), planned_steps=planned, accumulation=accumulation)
        if getattr(args, "eval_on_start", False):
            self._enter("evaluate")

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

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called at the end of training."""
        self.end()

    # --- a loop -------------------------------------------------------------------------------------------------------

    def steps(self, batches: Iterable[Batch], *, accumulation: int = 1) -> Iterator[Batch]:
        """Iterate over the batches of a loader, for a loop that updates once every `accumulation` batches: each such
        group is a step, and an incomplete group at the end is not a step.

        The wait for a batch is measured separately. Call it again for every epoch.
        """
        self._begin("loop", None if self._model is None else self._model(), accumulation=accumulation)
        if self._steps is None:
            yield from batches
            return
        steps, iterator, taken = self._steps, iter(batches), 0
        steps.is_observing = True
        try:
            while True:
                steps.mark("data", "begin")
                batch = next(iterator, _END)
                steps.mark("data", "end")
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
            steps.is_observing = False
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


def add_meter(trainer: Any) -> None:
    """Add a meter to a Trainer, unless the script has added one."""
    if not any(isinstance(callback, Meter) for callback in trainer.callback_handler.callbacks):
        trainer.add_callback(Meter())
