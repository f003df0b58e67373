"""The steps of a loop that nobody announces: what lies between two updates of an optimizer.

torch calls hooks of a process around the step of every optimizer. The training is known once the first update is done,
so the first step is seen by nobody. The optimizer that did it marks the steps from then on; another one that updates
within them, as in adversarial training or inside an optimizer that wraps it, is part of the step.

A step ends when the call of its update returns, and not in a hook of it: there torch goes through the hooks, and a
check that puts up or takes down its own would end the training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from harness.attach.attachment import this_process
from harness.attach.follower import Follower, Training
from harness.attach.identity import count_parameters, rank_of
from harness.attach.shield import Shield
from harness.attach.sight import Sight, find_root
from harness.attach.steps import Steps


class StopTraining(SystemExit):
    """No further step is wanted, and the loop is not ours to leave: the script ends here as by `sys.exit(0)`."""

    def __init__(self) -> None:
        super().__init__(0)


class OptimizerSource:
    """Sees the steps of the first optimizer that updates."""

    def __init__(self, make: Callable[[], Follower] | None = None) -> None:
        self._make = make
        self._steps: Steps | None = None
        self._sight: Sight | None = None
        self._optimizer: Any = None
        self._original: Callable[..., Any] | None = None
        """The optimizer's `step` as it was found."""
        self._aside = False

    def updated(self, optimizer: Any) -> None:
        """An optimizer of this process has updated; the hook of all of them. Raises `StopTraining`."""
        if self._optimizer is None and not self._aside and not this_process().occupied:
            self._begin(optimizer)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the optimizer's own. Raises `StopTraining` where the follower wants no further step."""
        original, steps = self._original, self._steps
        assert original is not None
        if steps is None or not steps.up or torch.compiler.is_compiling():
            return original(*args, **kwargs)
        with steps.during("optimizer"):
            found = original(*args, **kwargs)
        if self._sight is not None:
            steps.run(self._sight.tell_loss)
        steps.end_step()
        if not steps.go_on:
            self.end()
            raise StopTraining
        steps.open_step()
        return found

    def _begin(self, optimizer: Any) -> None:
        self._steps = Shield().run(self._follow, optimizer)
        if self._steps is None:
            self._aside = True
            return
        self._optimizer, self._original = optimizer, optimizer.step
        optimizer.step = functools.wraps(optimizer.step)(functools.partial(self._step))
        if not self._steps.go_on:
            self.end()
            raise StopTraining
        self._steps.restart()
        self._steps.open_step()

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
        if self._sight is not None:
            self._sight.end()
        if self._steps is not None:
            self._steps.end(None)

    def unended(self) -> BaseException | None:
        """What is said of a training that nobody ended: a loop like this has no end but that of its process."""
        return None
