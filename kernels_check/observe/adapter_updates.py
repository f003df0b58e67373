"""What each update made of the adapter, and whether that was still there at the next.

That a parameter differs after training from before says little: a state that is reloaded in every step, or a factor
that is set to zero, differs as well. So its value is compared before and after each update, and again at the next one
and at the end; an update counts as learning only where it moved the parameter and was given a gradient that a watched
call produced. Weight decay moves parameters without one, and bfloat16 may swallow an update whole.

An optimizer that is given a closure computes the gradients inside its step: the moment at which they are complete is
when the closure returns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kernels_check.observe.adapter_layers import trained_parameters, written_by_method
from kernels_check.observe.adapter_values import KeptValue
from kernels_check.observe.gradients import Gradients, largest
from kernels_check.observe.module_tree import Model
from kernels_check.observe.optimizers import OptimizerSeen, describe, rate_of

LEAST_UPDATES = 2
"""Wanted in any case: only the value at the next shows that an update was kept."""
LEAST_AFTER_LOSS = 4
"""Updates it takes to tell whether a first one that was undone was the only one."""
LEAST_RESTING = 3
"""Updates with a learning rate of zero after which no other is waited for: a warm-up from zero rests once."""


@dataclass(slots=True, kw_only=True)
class ParameterUpdates:
    """What became of one parameter of the adapter over the watched updates."""

    updates: int = 0
    """By an optimizer that was given it."""
    fed: int = 0
    """With a gradient that was produced for it and was not zero when it was taken."""
    moved: int = 0
    learnt: int = 0
    """Those that were fed and moved it."""
    stuck: int = 0
    """Those that were fed, with a learning rate, and left nearly every element as it was."""
    faint: int = 0
    """Those that were fed and changed nothing, since the gradient is so small: its partner has just left zero."""
    idle: int = 0
    """Of the stuck ones those that moved no parameter at all, although float32 shows such a move."""
    losses: list[int] = field(default_factory=list)
    """Which updates nothing was left of at the next or at the end, the first being 1."""
    written: int = 0
    """Times that something other than an update wrote to it."""
    unreadable: str | None = None
    """Why its value could not be compared."""
    rate: float = 0.0
    """Largest learning rate that it was given."""

    @property
    def lost(self) -> bool:
        """Whether updates are undone, and not just the first: a projection may move the weights far once."""
        return bool(self.losses) and (self.losses[-1] > 1 or self.updates < LEAST_AFTER_LOSS)

    @property
    def idling(self) -> bool:
        """Whether it was never moved, and nothing else by the same updates."""
        return self.idle > 0 and not self.moved and self.idle == self.stuck

    @property
    def resting(self) -> bool:
        """Whether every learning rate was zero."""
        return self.updates > 0 and self.rate == 0.0


@dataclass(slots=True)
class Updates:
    """Watches every optimizer that steps, by hooks that torch calls for all of them."""

    gradients: Gradients
    steps: int = 0
    optimizers: dict[int, OptimizerSeen] = field(default_factory=dict)
    parameters: dict[str, ParameterUpdates] = field(default_factory=dict)
    _names: dict[int, str] = field(default_factory=dict)
    _values: dict[int, KeptValue] = field(default_factory=dict)
    _by_method: frozenset[int] = frozenset()
    _fed: set[int] = field(default_factory=set)
    """Parameters whose gradient was there, and not zero, when an update could take it."""
    _before_call: tuple[int, int] = (0, 0)
    """Updates, and parameters that had learnt, before the last call."""

    def begin(self, model: Model) -> None:
        """Take the values from which the first update starts."""
        for name, tensor in trained_parameters(model).items():
            if not tensor.is_meta:
                self._names[id(tensor)] = name
                self._values[id(tensor)] = KeptValue(tensor)
        self._by_method = written_by_method(model)
        self.parameters = {self._names[key]: ParameterUpdates() for key in self._values}

    def goes_on(self, model: Model) -> bool:
        """Whether the same parameters are there, as the last call left them: nothing has updated them unseen."""
        here = {id(tensor): name for name, tensor in trained_parameters(model).items() if not tensor.is_meta}
        return here == self._names and all(
            key in self._by_method or value.is_last() for key, value in self._values.items()
        )

    def begin_call(self) -> None:
        """Note what had been seen before a call."""
        self._before_call = self.steps, self._learnt()

    def end_call(self) -> None:
        """Compare with what the last update left."""
        for key in self._values:
            self._compare(key)

    def before(self, optimizer: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Global optimizer hook: nothing has moved and, without a closure, the gradients are complete."""
        self._take(optimizer)
        closure = next((value for value in (*args[1:2], kwargs.get("closure")) if callable(value)), None)
        if closure is None:
            return None

        def watched(*given: Any, **named: Any) -> Any:
            self._settle(optimizer)  # some optimizers call it again from where they have moved
            result = closure(*given, **named)
            self._take(optimizer)
            return result

        return (
            tuple(watched if value is closure else value for value in args),
            {key: watched if value is closure else value for key, value in kwargs.items()},
        )

    def after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Global optimizer hook: the optimizer's state exists from here on."""
        self._settle(optimizer)
        for key, rate in self._given(optimizer).items():
            seen = self.parameters[self._names[key]]
            seen.updates += 1
            seen.fed += key in self._fed
            seen.rate = max(seen.rate, rate)
            self._fed.discard(key)
            self.gradients.waiting.discard(key)
        self.optimizers[id(optimizer)] = describe(optimizer)
        self.steps += 1

    def pending(self) -> bool:
        """Whether another call may show what these did not."""
        if not self.steps:  # something that is no optimizer of torch writes, or none has stepped yet
            return not any(one.written for one in self.parameters.values())
        seen = [one for one in self.parameters.values() if one.updates]
        if not seen:
            return self.steps < LEAST_UPDATES
        if any(one.updates < LEAST_UPDATES or (one.lost and one.losses == [1]) for one in seen):
            return True
        if all(one.learnt or one.faint for one in seen):
            return False
        if any(one.idling for one in seen):  # a warm-up may move nothing for some updates
            return True
        steps, learnt = self._before_call
        warming = any(one.resting and one.updates < LEAST_RESTING for one in seen)
        return self.steps == steps or self._learnt() > learnt or warming

    def _learnt(self) -> int:
        return sum(one.learnt > 0 for one in self.parameters.values())

    def _given(self, optimizer: Any) -> dict[int, float]:
        """The adapter's parameters that an optimizer updates, with their learning rates."""
        rates: dict[int, float] = {}
        for group in optimizer.param_groups:
            rate = rate_of(group)
            rates |= {id(value): rate for value in group["params"] if id(value) in self._values}
        return rates

    def _take(self, optimizer: Any) -> None:
        """Look at the values, and at the gradients that the update is about to take."""
        self.gradients.note_by_hand()
        for key in self._given(optimizer):
            self._compare(key)
            gradient = self._values[key].tensor.grad
            fed = gradient is not None and key in self.gradients.waiting and _is_nonzero(gradient)
            (self._fed.add if fed else self._fed.discard)(key)

    def _settle(self, optimizer: Any) -> None:
        """Count what an update has changed since the values were looked at."""
        given = self._given(optimizer)
        stuck = {key: self.parameters[self._names[key]].stuck for key in given}
        moved = [self._count(key, rate) for key, rate in given.items()]
        self.gradients.moved += any(moved)
        for key in given if not any(moved) else ():
            seen = self.parameters[self._names[key]]
            seen.idle += seen.stuck > stuck[key] and not self._values[key].is_narrow

    def _count(self, key: int, rate: float) -> bool:
        """Count an update of one parameter; one that cannot be read is no fault of the step, which goes on."""
        seen = self.parameters[self._names[key]]
        try:
            return self._counted(self._values[key], rate, seen, fed=key in self._fed)
        except Exception as error:
            seen.unreadable = f"{type(error).__name__}: {error}"
            return False

    def _counted(self, value: KeptValue, rate: float, seen: ParameterUpdates, *, fed: bool) -> bool:
        if not value.settle():
            if fed and rate:
                faint = value.is_faint(rate)
                seen.faint += faint
                seen.stuck += not faint
            return False
        seen.moved += 1
        if fed:
            stuck = value.is_stuck()
            seen.stuck += stuck
            seen.learnt += not stuck
        return True

    def _compare(self, key: int) -> None:
        """Count what has been written since the last update."""
        seen = self.parameters[self._names[key]]
        try:
            written, undone = self._values[key].written()
        except Exception as error:
            seen.unreadable = f"{type(error).__name__}: {error}"
            return
        if key not in self._by_method:
            seen.written += written
            if undone:
                seen.losses.append(seen.updates)


def _is_nonzero(gradient: Tensor) -> bool:
    try:
        size = largest(gradient)
    except Exception:  # of a kind that cannot be read, which the hook that saw it arrive has noted
        return True
    return size is None or float(size) != 0
