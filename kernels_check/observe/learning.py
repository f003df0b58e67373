"""The gradients that reached a model's parameters, and what each update made of the adapter.

``parameter.grad`` does not say when it was written, so each parameter carries a hook while it is watched, which sees
a gradient as it arrives. A sharded parameter of FSDP2 is the exception: its gradient is put together outside of
autograd.

That a parameter differs after training says little: a state that is reloaded in every step differs as well. So its
value is compared before and after each update, and again at the next one and at the end; an update counts as learning
only where it moved the parameter and was given a gradient that the step produced. Weight decay moves parameters
without one, and bfloat16 may swallow an update whole. With a closure the gradients are complete when the closure
returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernels_check.observe.adapter import adapter_parameters, trained_parameters, written_by_method
from kernels_check.observe.modules import (
    HookGuard,
    ModelTree,
    is_wrapper,
    largest,
    plain_parts,
)
from kernels_check.observe.profile import OptimizerSeen, describe, rate_of


@dataclass(slots=True)
class GradientSeen:
    """Gradients that reached one parameter over the watched calls."""

    sizes: list[Tensor] = field(default_factory=list)
    """Largest magnitude of each gradient, left on its device so that nothing waits for it in the backward pass."""
    produced: bool = True
    """Whether it was seen to arrive; else its origin is unknown, as of one put there by hand."""
    after_updates: int = 0
    """Updates that had moved something of the adapter when the last one arrived."""

    @property
    def nonzero(self) -> bool:
        """Whether any gradient had an element that is not zero."""
        return any(float(size) != 0 for size in self.sizes)

    @property
    def finite(self) -> bool:
        """Whether all elements of all gradients were finite."""
        return all(float(size) < float("inf") for size in self.sizes)


class Gradients:
    """Hooks on the parameters of a model, and the gradients that they saw.

    Args:
        guard: what hooks are wrapped in.
    """

    def __init__(self, guard: HookGuard) -> None:
        self._guard = guard
        self.moved = 0
        """Updates that have moved something of the adapter; kept by who watches those."""
        self.arrived: set[int] = set()
        """Parameters that a gradient reached since this was last cleared."""
        self.waiting: set[int] = set()
        """Parameters that a gradient reached and that no update has taken since; kept by who watches those."""
        self._seen: dict[int, GradientSeen] = {}
        self._at_first: dict[int, tuple[Tensor, Tensor | None]] = {}
        """The parameters of the model, with what lay there when the call began."""

    @contextmanager
    def watched(self, tree: ModelTree) -> Iterator[None]:
        """Hook every parameter that trains or is an adapter's; all hooks are off afterwards, whatever raised."""
        own = adapter_parameters(tree)
        with ExitStack() as hooks:
            for name, parameter in tree.parameters:
                if parameter.requires_grad or (name in own and parameter.is_floating_point()):
                    _hook(hooks, parameter, self._guard(partial(self._arrive, parameter)))
                    if is_wrapper(parameter):
                        hooks.push(parameter.register_post_accumulate_grad_hook(self._guard(self._written)))
            yield

    def begin_call(self, tree: ModelTree) -> None:
        """Remember the gradients before a call."""
        self._at_first = {id(parameter): (parameter, parameter.grad) for _, parameter in tree.parameters}
        self.arrived.clear()

    def end_call(self, model: nn.Module) -> None:
        """Notice gradients that were put there by hand, and hold on to none that lay there before."""
        self.note_by_hand(model.parameters())
        self._at_first = {}

    def note_by_hand(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Count a gradient that no hook saw and that is another than before the call.

        Args:
            parameters: to look at; those of the model as the call began where none are given.
        """
        for parameter in [one for one, _ in self._at_first.values()] if parameters is None else parameters:
            key, gradient = id(parameter), parameter.grad
            if key in self.arrived or gradient is None or gradient is self._at_first.get(key, (None, None))[1]:
                continue
            self._note(parameter, gradient, produced=False)

    def reached(self, tree: ModelTree) -> frozenset[str]:
        """Names of the parameters that a gradient reached in the last call."""
        return frozenset(name for name, value in tree.parameters if id(value) in self.arrived)

    def seen(self, tree: ModelTree) -> Mapping[str, GradientSeen]:
        """The gradients of each parameter that any reached, by name."""
        found = {name: self._seen.get(id(parameter)) for name, parameter in tree.parameters}
        return {name: one for name, one in found.items() if one is not None and one.sizes}

    def _arrive(self, parameter: Tensor, gradient: Tensor | None) -> None:
        if gradient is not None:  # autograd calls hooks for undefined gradients, too, as behind repacked 4-bit weights
            self.arrived.add(id(parameter))
            self._note(parameter, gradient)

    def _written(self, parameter: Tensor) -> None:
        self.arrived.add(id(parameter))
        if parameter.grad is not None:
            self._note(parameter, parameter.grad)

    def _note(self, parameter: Tensor, gradient: Tensor, *, produced: bool = True) -> None:
        key = id(parameter)
        self.waiting.add(key)
        seen = self._seen.setdefault(key, GradientSeen())
        seen.after_updates = self.moved
        seen.produced = seen.produced and produced
        size = largest(gradient)
        seen.sizes += [] if size is None else [size]


def _hook(hooks: ExitStack, parameter: Tensor, noted: Any) -> None:
    """Hook a parameter, also one that trains only later in the step."""
    trains = parameter.requires_grad
    with suppress(RuntimeError):  # what cannot train cannot be hooked
        try:
            hooks.push(parameter.requires_grad_(True).register_hook(noted))
        finally:
            parameter.requires_grad_(trains)


STUCK_SHARE = 0.9
"""Share of the elements with a gradient that an update must leave as they are to count as lost to rounding."""
LEAST_UPDATES = 2
"""Wanted in any case: only the value at the next shows that an update was kept."""
LEAST_AFTER_LOSS = 4
"""Updates after which a first one that was undone counts as the only one."""
LEAST_RESTING = 3
"""Updates with a learning rate of zero after which no other is waited for: a warm-up from zero rests once."""
_NARROW = (torch.bfloat16, torch.float16)


@dataclass(slots=True, kw_only=True)
class ParameterUpdates:
    """One parameter of the adapter, its last known value, and what became of it over the watched updates.

    Of a sharded parameter the value is that of the part that is here.
    """

    name: str
    tensor: Tensor
    by_method: bool
    """Whether its method writes to it between updates."""
    is_fed: bool = False
    """Whether its gradient was there, and not zero, when an update could take it."""
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
    _value: list[Tensor] = field(default_factory=list)
    _before: list[Tensor] = field(default_factory=list)
    """The value from which the last update started; none once something else wrote to it."""

    def __post_init__(self) -> None:
        self._keep(_parts(self.tensor), [])

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

    @property
    def is_narrow(self) -> bool:
        """Whether its dtype may swallow an update."""
        return self.tensor.dtype in _NARROW

    def is_kept(self) -> bool:
        """Whether it has the last known value."""
        return all(_is_same(now, then) for now, then in zip(_parts(self.tensor), self._value, strict=True))

    def compare(self, *, stepping: bool) -> None:
        """Count what something other than an update wrote, unless its optimizer is stepping: SAM goes back then.

        What projects the weights after an update (a clamp, a norm) moves few of them, or all of them by less.
        """
        try:
            if self.is_kept():
                return
            value = _parts(self.tensor)
            undone = bool(self._before) and self._undoes(value)
            self._keep(value, [])
        except Exception as error:  # no fault of the step, which continues
            self.unreadable = f"{type(error).__name__}: {error}"
            return
        if not self.by_method and not stepping:
            self.written += 1
            self.losses += [self.updates] if undone else []

    def settle(self, rate: float) -> tuple[bool, bool]:
        """Count what an update wrote; whether it moved anything, and whether it left what it should have moved."""
        try:
            moved = not self.is_kept()
            if moved:
                self._keep(_parts(self.tensor), self._value)
            faint = self.is_fed and bool(rate) and not moved and self._is_faint(rate)
            stuck = self.is_fed and (self._is_rounded_away() if moved else bool(rate) and not faint)
        except Exception as error:
            self.unreadable = f"{type(error).__name__}: {error}"
            return False, False
        self.moved += moved
        self.faint += faint
        self.stuck += stuck
        self.learnt += moved and self.is_fed and not stuck
        return moved, stuck

    def _keep(self, value: list[Tensor], before: list[Tensor]) -> None:
        self._value = [part.clone() for part in value]
        self._before = before

    def _is_faint(self, rate: float) -> bool:
        """Whether an update in proportion to the gradient is too small for float32 to show."""
        gradient = self.tensor.grad
        size = None if gradient is None or self.is_narrow else largest(gradient)
        if size is None:
            return False
        greatest = max((float(part.abs().max()) for part in self._value if part.numel()), default=0.0)
        return rate * float(size) < torch.finfo(self.tensor.dtype).eps * greatest

    def _is_rounded_away(self) -> bool:
        """Whether the last update left nearly all elements with a gradient unchanged, as a narrow dtype may."""
        gradient = self.tensor.grad
        if not self.is_narrow or gradient is None or gradient.layout != torch.strided:
            return False
        pairs = [(one != 0, moved) for one, moved in zip(_parts(gradient), self._moved(), strict=True)]
        given = sum(int(has.sum()) for has, _ in pairs)
        return sum(int((has & ~moved).sum()) for has, moved in pairs) > STUCK_SHARE * given

    def _moved(self) -> list[Tensor]:
        """Which elements the last update moved."""
        return [now != then for now, then in zip(self._value, self._before, strict=True)]

    def _undoes(self, value: list[Tensor]) -> bool:
        """Whether a value is as far from the last known one as the update had moved that, and in other places."""
        if not _distance(self._value, self._before) <= _distance(value, self._value) * (1 + 1e-6):
            return False
        moved = self._moved()
        left = sum(int(((now == then) & one).sum()) for now, then, one in zip(value, self._value, moved, strict=True))
        return left < sum(int(one.sum()) for one in moved) / 2


def _distance(one: list[Tensor], other: list[Tensor]) -> float:
    """Euclidean distance of two values; equal parts may be infinite."""
    pairs = [(now, then) for now, then in zip(one, other, strict=True) if not torch.equal(now, then)]
    total: float = sum(float((now.double() - then.double()).square().sum()) for now, then in pairs) ** 0.5
    return total


def _is_same(now: Tensor, then: Tensor) -> bool:
    """Whether two tensors are equal, NaN being equal to NaN."""
    alike = (now.shape, now.dtype) == (then.shape, then.dtype)
    return torch.equal(now, then) or (alike and torch.allclose(now, then, rtol=0.0, atol=0.0, equal_nan=True))


def _parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that one is made of, as far as they are here."""
    return [part for _, part in plain_parts(tensor.detach())]


class Updates:
    """Watches every optimizer that steps, by hooks that torch calls for all of them.

    Args:
        tree: the model as it is before the first update.
        gradients: that reach its parameters.
    """

    def __init__(self, tree: ModelTree, gradients: Gradients) -> None:
        written = written_by_method(tree)
        self.gradients = gradients
        self.steps = 0
        self.optimizers: dict[int, OptimizerSeen] = {}
        self._parameters = {
            id(tensor): ParameterUpdates(name=name, tensor=tensor, by_method=id(tensor) in written)
            for name, tensor in trained_parameters(tree).items()
            if not tensor.is_meta
        }
        self._stepping = 0
        """Optimizers that are stepping: one may hold another, and what it writes before that steps is its own."""
        self._before_call = (0, 0)
        """Updates, and parameters that had learnt, before the last call."""

    def by_name(self) -> dict[str, ParameterUpdates]:
        """The updates of each parameter, by name."""
        return {one.name: one for one in self._parameters.values()}

    def continues(self, tree: ModelTree) -> bool:
        """Whether the model still holds the same parameters with the values that the last call left."""
        here = {id(tensor): name for name, tensor in trained_parameters(tree).items() if not tensor.is_meta}
        known = self._parameters
        return here == {key: one.name for key, one in known.items()} and all(
            one.by_method or one.is_kept() for one in known.values()
        )

    def begin_call(self) -> None:
        """Remember the counts before a call."""
        self._before_call, self._stepping = (self.steps, self._learnt()), 0

    def end_call(self) -> None:
        """Compare values with those after the last update."""
        for one in self._parameters.values():
            one.compare(stepping=self._stepping > 0)

    def before(self, optimizer: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Global optimizer hook: nothing has moved and, without a closure, the gradients are complete."""
        self._take(optimizer)
        self._stepping += 1
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

    def after(self, optimizer: Any) -> None:
        """Global optimizer hook: the optimizer's state exists from here on."""
        self._stepping = max(self._stepping - 1, 0)
        self._settle(optimizer)
        for one, rate in self._given(optimizer):
            one.updates += 1
            one.fed += one.is_fed
            one.rate = max(one.rate, rate)
            one.is_fed = False
            self.gradients.waiting.discard(id(one.tensor))
        self.optimizers[id(optimizer)] = describe(optimizer)
        self.steps += 1

    def pending(self) -> bool:
        """Whether another call may show more than these did."""
        if not self.steps:  # something that is no optimizer of torch writes, or none has stepped yet
            return not any(one.written for one in self._parameters.values())
        seen = [one for one in self._parameters.values() if one.updates]
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
        return sum(one.learnt > 0 for one in self._parameters.values())

    def _given(self, optimizer: Any) -> list[tuple[ParameterUpdates, float]]:
        """The adapter's parameters that an optimizer updates, with their learning rates."""
        rates = {id(value): rate_of(group) for group in optimizer.param_groups for value in group["params"]}
        return [(self._parameters[key], rate) for key, rate in rates.items() if key in self._parameters]

    def _take(self, optimizer: Any) -> None:
        """Look at the values, and at the gradients that the update is about to take."""
        self.gradients.note_by_hand()
        for one, _ in self._given(optimizer):
            one.compare(stepping=self._stepping > 0)
            gradient = one.tensor.grad if id(one.tensor) in self.gradients.waiting else None
            size = None if gradient is None else largest(gradient)
            one.is_fed = gradient is not None and (size is None or float(size) != 0)

    def _settle(self, optimizer: Any) -> None:
        """Count what an update has changed since the values were looked at."""
        found = [(one, *one.settle(rate)) for one, rate in self._given(optimizer)]
        any_moved = any(moved for _, moved, _ in found)
        self.gradients.moved += any_moved
        for one, _, stuck in found:
            one.idle += stuck and not any_moved and not one.is_narrow
