"""The steps of a loop: those that it names (`for batch in steps(loader)`), else what lies between two updates of an
optimizer.

The hook of a process (`hook/sitecustomize.py`) calls `OptimizerSource` around the `step` of every optimizer. The
training is known once the first update is done, so the first step is not seen. The optimizer that did it marks the
steps from then on; another one that updates within them, as in adversarial training or inside an optimizer that wraps
it, is part of the step. The training has ended when its optimizer has been freed, or updates no more while another one
does.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lorameter.attach.attachment import follow, this_process
from lorameter.attach.model_hooks import ModelHooks, Patches, compiles_here, find_root, uncompiled
from lorameter.attach.observer import ErrorGuard, Phase, TrainingObserver, say, weakly
from lorameter.attach.steps import Steps

MOST_OTHERS = 100
"""Updates of another optimizer without one of the first, after which the first training is over: no step of several
optimizers has so many of one."""


class OptimizerSource:
    """Sees the steps of the first optimizer that updates, and holds nothing of its training."""

    def __init__(self, make: Callable[[], TrainingObserver] | None = None) -> None:
        self._make = make
        self._steps: Steps | None = None
        self._hooks: ModelHooks | None = None
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
        self._aside = compiles_here()
        """Whether nothing is followed: no training was begun, or it has ended."""
        if self._aside:
            say("this training is not followed: torch.compile compiles its whole step, with the optimizer's update")
        self.begin_update = uncompiled(self._begin_update)
        """An update begins."""
        self.end_update = uncompiled(self._end_update)
        """An update of this optimizer has ended. None: it has failed."""

    def _begin_update(self) -> None:
        self._inside += 1
        if self._inside == 1 and self._steps is not None and self._steps.up:
            if self._hooks is not None:
                self._hooks.updates = True
                if self._hooks.passes_in_update:
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
        if self._hooks is not None:
            self._hooks.updates = False
        if self._updated:
            self._updated = False
            self._end_step(self._steps)

    def _note(self, optimizer: Any) -> None:
        """Which optimizer has updated."""
        if optimizer is self._optimizer():
            self._updated = True
            self._others.clear()
            return
        self._others[id(optimizer)] += 1
        if self._optimizer() is None or self._others[id(optimizer)] >= MOST_OTHERS:
            self._aside = True
            self._take_off()
            if self._steps is not None:
                self._steps.end(None, seen=False)
            this_process().report_another("optimizer")

    def _end_step(self, steps: Steps) -> None:
        self._call.take_off()
        if self._hooks is not None:
            steps.run(self._hooks.end_step)
        steps.end_step()
        self._open_step(steps)

    def _open_step(self, steps: Steps) -> None:
        """A step that is to be watched is opened when a module of the model is called: after the last step none is.
        Where a closure of the update does so, the update opens it."""
        model, in_update = self._model(), self._hooks is not None and self._hooks.passes_in_update
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
        self._steps.restart()
        self._open_step(self._steps)

    def _follow(self, optimizer: Any) -> Steps | None:
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        model = find_root(parameters)
        steps = follow(self, "optimizer", model, self._make, parameters=parameters)
        if steps is not None:
            self._model = weakly(model) or self._model
            self._hooks = ModelHooks(steps, batches=True)
        return steps

    def _take_off(self) -> None:
        """Nothing more of the training is seen. What was seen is written later, by the next update or at the end of the
        process: this may be called anywhere, as by the garbage collector."""
        for patches in (self._patches, self._call):
            patches.take_off()
        if self._hooks is not None:
            self._hooks.end()
        if self._steps is not None:
            self._steps.break_off()

    def end(self) -> None:
        """Nothing more is followed."""
        self._aside = True
        self._take_off()
        if self._steps is not None:
            self._steps.end(None)


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
        self._hooks: ModelHooks | None = None
        self._handles: list[Any] = []
        self._begun = False

    def steps(self, batches: Iterable[Batch], accumulation: int) -> Iterator[Batch]:
        """The batches; `accumulation` of them are a step, and what is left over at the end is none."""
        if not self._begun:  # the training begins with the first call
            self._begun = True
            self._steps = ErrorGuard().run(self._follow, accumulation)
        steps, hooks = self._steps, self._hooks
        if steps is None or hooks is None:
            yield from batches
            return
        iterator, taken = iter(batches), 0
        steps.restart()
        try:
            hooks.within = True
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
                if taken == 0:
                    steps.run(hooks.end_step)
                    steps.end_step()
        finally:
            hooks.within = False
            steps.break_off()

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

    def end(self, error: BaseException | None) -> None:
        """The training has ended."""
        while self._handles:
            self._handles.pop().remove()
        if self._hooks is not None:
            self._hooks.end()
        if self._steps is not None:
            self._steps.end(error)

    def _follow(self, accumulation: int) -> Steps | None:
        model = None if self._model is None else self._model()
        steps = follow(self, "loop", model, self._make, accumulation=accumulation, required=self._required)
        if steps is not None:
            self._hooks = ModelHooks(steps, batches=False)
            self._hooks.within = False
            self._see_updates(self._hooks, steps)
        return steps

    def _see_updates(self, hooks: ModelHooks, steps: Steps) -> None:
        """Every optimizer's update within a step is a part of it. Where one is compiled, the hook is nothing."""
        compiling = torch.compiler.is_compiling

        def hook_of(call: Callable[[], None]) -> Callable[..., None]:
            call = uncompiled(call)

            def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
                if not compiling() and hooks.within:
                    call()

            return hook

        self._handles = [
            register_optimizer_step_pre_hook(hook_of(steps.during["optimizer"].begin)),
            register_optimizer_step_post_hook(hook_of(steps.during["optimizer"].end)),
        ]


_END = object()
