"""The steps of a loop that nobody announces: what lies between two updates of an optimizer.

The hook of a process (`hook/sitecustomize.py`) calls this around the `step` of every optimizer. The training is known
once the first update is done, so the first step is not seen. The optimizer that did it marks the steps from then on;
another one that updates within them, as in adversarial training or inside an optimizer that wraps it, is part of the
step. The training has ended when its optimizer has been freed, or updates no more while another one does.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from lorameter.attach.attachment import this_process
from lorameter.attach.error_guard import ErrorGuard, say
from lorameter.attach.identity import count_parameters, rank_of
from lorameter.attach.model_hooks import ModelHooks, find_root
from lorameter.attach.observer import TrainingInfo, TrainingObserver, weakly
from lorameter.attach.patches import Patches, compiles_here, uncompiled
from lorameter.attach.steps import Steps

MOST_OTHERS = 100
"""Updates of another optimizer without one of the first, after which the first training is over: no step of several
optimizers has so many of one."""


class StopTraining(SystemExit):
    """No further step is wanted, and the loop is not ours to leave: the script ends here as by `sys.exit(0)`."""

    def __init__(self) -> None:
        super().__init__(0)


class OptimizerSource:
    """Sees the steps of the first optimizer that updates, and holds nothing of its training."""

    def __init__(self, make: Callable[[], TrainingObserver] | None = None) -> None:
        self._make = make
        self._steps: Steps | None = None
        self._sight: ModelHooks | None = None
        self._optimizer: Callable[[], Any] = lambda: None
        self._model: Callable[[], Any] = lambda: None
        self._patches = Patches()
        self._call = Patches()
        """The call of a module, until one of the model is called in a step that is to be watched."""
        self._parts: frozenset[int] = frozenset()
        """The identities of its modules, of which a loop may call any."""
        self._trained = True
        """Whether the model was in training mode at the last update."""
        self._inside = 0
        """Updates that are under way, one inside the other."""
        self._updated = False
        """Whether the first optimizer has updated inside the outermost of them."""
        self._others: Counter[int] = Counter()
        """Updates of each other optimizer since the last one of the first."""
        self._most_others = 0
        """Those of all others within a step, at most."""
        self._aside = compiles_here()
        """Whether nothing is followed: no training was begun, or it has ended."""
        if self._aside:
            say("this training is not followed: torch.compile compiles its whole step, with the optimizer's update")
        self.begin_update = uncompiled(self._begin_update)
        """An update begins."""
        self.end_update = uncompiled(self._end_update)
        """An update of this optimizer has ended; raises `StopTraining`. None: it has failed."""

    def _begin_update(self) -> None:
        self._inside += 1
        if self._inside == 1 and self._steps is not None and self._steps.up:
            if self._sight is not None:
                self._sight.updates = True
                if self._sight.passes_in_update:
                    self._steps.open_step()
            self._steps.during["optimizer"].begin()

    def _end_update(self, optimizer: Any) -> None:
        self._inside = max(0, self._inside - 1)
        if self._aside:
            return
        if self._steps is None:
            if optimizer is not None and not this_process().occupied:
                self._begin(optimizer)
            return
        if optimizer is not None:
            self._note(optimizer)
        if self._inside or self._aside or not self._steps.up:
            return
        self._steps.during["optimizer"].end()
        if self._sight is not None:
            self._sight.updates = False
        if self._updated:
            self._updated = False
            self._end_step(self._steps)

    def _note(self, optimizer: Any) -> None:
        """Which optimizer has updated."""
        if optimizer is self._optimizer():
            self._updated = True
            self._most_others = max(self._most_others, self._others.total())
            self._others.clear()
            return
        self._others[id(optimizer)] += 1
        if self._optimizer() is None or self._others[id(optimizer)] >= MOST_OTHERS:
            self._aside = True
            self._take_off()
            if self._steps is not None:
                self._steps.end(None, seen=False)
            this_process().tell_of_another("optimizer")

    def tell_of_later(self) -> None:
        """The process ends: tell of another training that has begun after the last step of the first."""
        if self._others.total() > self._most_others:
            this_process().tell_of_another("optimizer")

    def _end_step(self, steps: Steps) -> None:
        self._call.take_off()
        if self._sight is not None:
            steps.run(self._sight.end_step)
        if not steps.end_step():
            self.end()
            raise StopTraining
        self._open_step(steps)

    def _open_step(self, steps: Steps) -> None:
        """A step that is to be watched is opened when a module of the model is called: after the last step none is.
        Where a closure of the update does so, the update opens it."""
        model, in_update = self._model(), self._sight is not None and self._sight.passes_in_update
        if steps.watch_is_due and model is not None and not in_update:
            self._trained, self._parts = model.training, frozenset(map(id, model.modules()))
            self._call.put(torch.nn.Module, "__call__", before=self._called)

    def _called(self, args: tuple[Any, ...]) -> None:
        model = self._model()
        if model is None or self._steps is None or id(args[0]) not in self._parts:
            return
        if torch.is_grad_enabled() and model.training == self._trained:
            self._call.take_off()
            self._steps.open_step()

    def _begin(self, optimizer: Any) -> None:
        self._steps = ErrorGuard().run(self._follow, optimizer)
        if self._steps is None:
            self._aside = True
            return
        self._optimizer = weakref.ref(optimizer)
        weakref.finalize(optimizer, self._take_off).atexit = False  # while the interpreter ends, modules are gone
        self._patches.put(
            torch.amp.GradScaler, "step",
            before=lambda _: self._begin_update(), after=lambda *_: self._end_update(None),
        )  # fmt: skip
        if not self._steps.go_on:
            self.end()
            raise StopTraining
        self._steps.restart()
        self._open_step(self._steps)

    def _follow(self, optimizer: Any) -> Steps | None:
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        model = find_root(parameters)
        trainable, total = count_parameters(model)
        rank, ranks = rank_of()
        training = TrainingInfo(
            source="optimizer",
            model=weakly(model),
            planned_steps=None,
            trainable_parameters=trainable if model is not None else sum(one.numel() for one in parameters),
            total_parameters=total,
            accumulation=None,
            rank=rank,
            ranks=ranks,
        )
        device = parameters[0].device if parameters else torch.device("cpu")
        steps = this_process().begin(self, training, device, self._make)
        if steps is not None:
            self._model = training.model or self._model
            self._sight = ModelHooks(steps, batches=True)
        return steps

    def _take_off(self) -> None:
        """Nothing more of the training is seen. What was seen is written later, by the next update or at the end of the
        process: this may be called anywhere, as by the garbage collector."""
        for patches in (self._patches, self._call):
            patches.take_off()
        if self._sight is not None:
            self._sight.end()
        if self._steps is not None:
            self._steps.break_off()

    def end(self) -> None:
        """Nothing more is followed."""
        self._aside = True
        self._take_off()
        if self._steps is not None:
            self._steps.end(None)
