"""The meter that a script imports: a callback of transformers' Trainer, and the same for any loop.

    trainer = Trainer(..., callbacks=[Meter()])                  for batch in Meter(model).steps(loader):

What it measures becomes a run on disk, as `lorameter run` leaves one, and its report is printed at the end. A training
that is wrapped (`lorameter wrap`), or that takes turns with others, is told to those in its place.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from lorameter.attach.attachment import named_follower
from lorameter.attach.environment import DEFAULT_FOLLOWER, ENV_FOLLOWER
from lorameter.attach.loop import LoopSource
from lorameter.attach.observer import TrainingObserver
from lorameter.attach.trainer import TrainerSource
from lorameter.records.store import ENV_RUNS

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
        log: bool = True,
    ) -> None:
        """Nothing is measured before the training begins.

        Args:
            model: of a loop: the module that is called; what is not given is not seen (a Trainer gives its own).
            runs_dir: where the run is written; None: $LORAMETER_RUNS, else ./.lorameter/runs.
            require: paths of kernels_check that a step must have, which is looked at after the warm-up.
            report: whether the report is printed when the training has ended.
            log: whether a Trainer's trackers are told, under names that begin with "lorameter/".
        """
        named = runs_dir or os.environ.get(ENV_RUNS)
        self._runs_dir = None if named is None else Path(named).absolute()  # a script may change its folder
        required = dict(require or {})
        self._report = report
        written = os.environ.get(ENV_FOLLOWER, DEFAULT_FOLLOWER) == DEFAULT_FOLLOWER
        super().__init__(self._make_follower, log=log and written, required=required)
        self._loop = LoopSource(model, self._make_follower, required)

    def _make_follower(self) -> TrainingObserver:
        if os.environ.get(ENV_FOLLOWER):
            return named_follower()
        from lorameter.attach.writer import Writer

        return Writer(runs_dir=self._runs_dir, report=self._report)

    def steps(self, batches: Iterable[Batch], *, accumulation: int = 1) -> Iterator[Batch]:
        """The batches of a loader, for a loop that updates once every `accumulation` of them: that is a step.

        The wait for a batch is measured apart. It may be called again, as once an epoch.
        """
        return self._loop.steps(batches, accumulation)

    def step(self, batch: Any = None) -> AbstractContextManager[None]:
        """The block is one step. Tokens are those of the batch, or of what a DataLoader of torch has loaded for it."""
        return self._loop.step(batch)

    def evaluating(self) -> AbstractContextManager[None]:
        """The block evaluates: it is in no step's time, and its peak of memory is one of its own."""
        return self._loop.phase("evaluate")

    def saving(self) -> AbstractContextManager[None]:
        """The block saves: as `evaluating`."""
        return self._loop.phase("save")

    def loss(self, loss: Any) -> None:
        """The loss of the step under way, or a part of it; what a model returns as `loss` is seen by itself."""
        self._loop.loss(loss)

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
        trainer.add_callback(Meter(log=False))  # its log is the script's own
