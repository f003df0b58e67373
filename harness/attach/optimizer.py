"""The steps of a loop that nobody announces: what lies between two updates of an optimizer.

torch calls hooks of a process around the step of every optimizer. The training is known once the first update is done,
so the first step is seen by nobody. The optimizer that did it marks the steps from then on; another one that updates
within them, as in adversarial training or inside an optimizer that wraps it, is part of the step.

A step ends when the call of its update returns, and not in a hook of it: there torch goes through the hooks, and a
check that puts up or takes down its own would end the training.
"""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from harness.attach.attachment import this_process
from harness.attach.follower import Follower, Training
from harness.attach.identity import count_parameters, rank_of
from harness.attach.shield import Shield
from harness.attach.sight import Sight, find_root
from harness.attach.steps import Steps

OTHERS_TO_TAKE_OVER = 3
"""Updates of another optimizer without one of the first after which the first is taken to be given up: two in turn are
a training of two, as an adversarial one, and one for each parameter is a training of them all."""


class StopTraining(SystemExit):
    """No further step is wanted, and the loop is not ours to leave: the script ends here as by `sys.exit(0)`."""

    def __init__(self) -> None:
        super().__init__(0)


class OptimizerSource:
    """Sees the steps of the first optimizer that updates; of another one, where that updates no more."""

    def __init__(self, make: Callable[[], Follower] | None = None) -> None:
        self._make = make
        self._steps: Steps | None = None
        self._sight: Sight | None = None
        self._optimizer: Any = None
        self._update: _Replacement | None = None
        """The optimizer's `step`."""
        self._scaler: _Replacement | None = None
        """A scaler's `step`, which calls that of an optimizer, or one that a library puts there for as long."""
        self._inside = 0
        """Calls of ours that are under way."""
        self._updated = False
        """Whether the update of a step is done, and its call has not returned."""
        self._others: Counter[int] = Counter()
        """Updates of each other optimizer since the last one."""
        self._aside = False

    def see_update(self, optimizer: Any) -> None:
        """An optimizer of this process has updated; the hook of all of them. Raises `StopTraining`."""
        if self._optimizer is None:
            if not self._aside and not this_process().occupied:
                self._begin(optimizer)
        elif optimizer is self._optimizer:
            self._others.clear()
            self._updated = bool(self._inside)
            if not self._inside and self._update is not None:  # somebody has put another `step` there
                self._update.put()
        else:
            self._others[id(optimizer)] += 1
            if self._others[id(optimizer)] >= OTHERS_TO_TAKE_OVER:
                self._take_over(optimizer)

    def _take_over(self, optimizer: Any) -> None:
        """What was computed since the first one's last update is no step."""
        steps = self._steps
        if steps is None or not steps.up:
            return
        self._mark(optimizer)
        if self._sight is not None:
            self._sight.forget()
        steps.restart()

    def _mark(self, optimizer: Any) -> None:
        """This one marks the steps from now on."""
        if self._update is not None:
            self._update.take_off()
        self._others.clear()
        self._updated, self._optimizer = False, optimizer
        self._update = _Replacement(optimizer, "step", self._call)
        self._update.put()

    def _call(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of an update. The step has ended when the outermost one returns. Raises `StopTraining` where the
        follower wants no further step."""
        steps = self._steps
        if steps is None or not steps.up or self._inside or torch.compiler.is_compiling():
            return original(*args, **kwargs)
        self._inside += 1
        try:
            with steps.during["optimizer"]:
                found = original(*args, **kwargs)
        finally:
            self._inside -= 1
        if self._updated:  # a scaler leaves one out where a gradient is not finite
            self._updated = False
            self._end_step(steps)
        return found

    def _end_step(self, steps: Steps) -> None:
        if self._sight is not None:
            steps.run(self._sight.tell_loss)
        if not steps.end_step():
            self.end()
            raise StopTraining
        steps.open_step()

    def _begin(self, optimizer: Any) -> None:
        self._steps = Shield().run(self._follow, optimizer)
        if self._steps is None:
            self._aside = True
            return
        self._mark(optimizer)
        self._scaler = _Replacement(torch.amp.GradScaler, "step", self._call_scaler)
        self._scaler.put()
        if not self._steps.go_on:
            self.end()
            raise StopTraining
        self._steps.restart()
        self._steps.open_step()

    def _call_scaler(self, original: Callable[..., Any], scaler: Any, *args: Any, **kwargs: Any) -> Any:
        return self._call(functools.partial(original, scaler), *args, **kwargs)

    def _follow(self, optimizer: Any) -> Steps | None:
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        model = find_root(parameters)
        trainable, total = count_parameters(model)
        rank, ranks = rank_of()
        training = Training(
            source="optimizer",
            model=model,
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
            self._sight = Sight(model, steps, batches=True)
        return steps

    def end(self) -> None:
        """Nothing more is followed."""
        for one in (self._update, self._scaler):
            if one is not None:
                one.take_off()
        if self._sight is not None:
            self._sight.end()
        if self._steps is not None:
            self._steps.end(None)


class _Replacement:
    """A method of an object, or of a class, that something is called in place of. It is a method still, since others
    take it apart (torch's schedulers do)."""

    def __init__(self, holder: Any, name: str, call: Callable[..., Any]) -> None:
        self._holder, self._name, self._call = holder, name, call
        self._ours: Any = None
        self._was: Any = None

    def put(self) -> None:
        """Put it there, around what is there now."""
        original = getattr(self._holder, self._name)

        bound = not isinstance(self._holder, type)

        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return self._call(original, *args[1 if bound else 0 :], **kwargs)

        self._was = vars(self._holder).get(self._name)
        self._ours = types.MethodType(replacement, self._holder) if bound else replacement
        setattr(self._holder, self._name, self._ours)

    def take_off(self) -> None:
        """What was there is there again; what somebody has put in place of ours since stays."""
        if self._ours is None or vars(self._holder).get(self._name) is not self._ours:
            return
        if self._was is None:
            delattr(self._holder, self._name)
        else:
            setattr(self._holder, self._name, self._was)
