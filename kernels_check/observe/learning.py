"""Observes the gradients of a model's parameters, and the effect of each update on the adapter.

``parameter.grad`` does not show when it was written, so each watched parameter has a hook that records a gradient when
it arrives. Sharded parameters of FSDP2 are the exception: their gradient is assembled outside of autograd.

A changed parameter does not prove learning: a state that is reloaded in every step also differs. So the value is
compared before and after each update, at the next update, and at the end. An update counts as learning only if it
changed the parameter and used a gradient that the step produced. Weight decay changes parameters without a gradient,
and in bfloat16 rounding may lose an update entirely. With a closure the gradients are complete when the closure
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
    hook_gradient,
    is_wrapper,
    largest_magnitude,
    plain_parts,
)
from kernels_check.observe.profile import OptimizerRecord, describe_optimizer, learning_rate


@dataclass(slots=True)
class GradientRecord:
    """Gradients that one parameter received over the watched calls."""

    sizes: list[Tensor] = field(default_factory=list)
    """Largest magnitude of each gradient; it stays on its device to avoid a synchronisation in the backward pass."""
    produced: bool = True
    """Whether a hook saw it arrive; otherwise its origin is unknown, for example assigned by the script."""
    after_updates: int = 0
    """Number of updates that had changed the adapter when the last gradient arrived."""

    @property
    def nonzero(self) -> bool:
        """Whether any gradient had a nonzero element."""
        return any(float(size) != 0 for size in self.sizes)

    @property
    def finite(self) -> bool:
        """Whether all elements of all gradients were finite."""
        return all(float(size) < float("inf") for size in self.sizes)


class Gradients:
    """Hooks on the parameters of a model, and the gradients that they recorded.

    Args:
        guard: wraps each hook.
    """

    def __init__(self, guard: HookGuard) -> None:
        self._guard = guard
        self.moved = 0
        """Number of updates that changed the adapter; written by ``Updates``."""
        self.arrived: set[int] = set()
        """Parameters that received a gradient since this set was last cleared."""
        self.waiting: set[int] = set()
        """Parameters that received a gradient which no update has used yet; written by ``Updates``."""
        self._seen: dict[int, GradientRecord] = {}
        self._at_first: dict[int, tuple[Tensor, Tensor | None]] = {}
        """The parameters of the model, with their gradients at the start of the call."""

    @contextmanager
    def watched(self, tree: ModelTree) -> Iterator[None]:
        """Hook every parameter that trains or belongs to an adapter, for one call; all hooks are removed afterwards,
        also after an exception."""
        own = adapter_parameters(tree)
        self._at_first = {id(parameter): (parameter, parameter.grad) for _, parameter in tree.parameters}
        self.arrived.clear()
        with ExitStack() as hooks:
            for name, parameter in tree.parameters:
                if parameter.requires_grad or (name in own and parameter.is_floating_point()):
                    _hook(hooks, parameter, self._guard(partial(self._on_gradient, parameter)))
                    if is_wrapper(parameter):
                        hooks.push(parameter.register_post_accumulate_grad_hook(self._guard(self._on_accumulated)))
            yield

    def end_call(self, model: nn.Module) -> None:
        """Record gradients that the script assigned, and release the stored earlier gradients."""
        self.record_assigned(model.parameters())
        self._at_first = {}

    def record_assigned(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Record a gradient that no hook saw and that differs from the one before the call.

        Args:
            parameters: parameters to inspect; default: those of the model at the start of the call.
        """
        for parameter in [one for one, _ in self._at_first.values()] if parameters is None else parameters:
            gradient, (_, earlier) = parameter.grad, self._at_first.get(id(parameter), (None, None))
            if gradient is not None and gradient is not earlier and id(parameter) not in self.arrived:
                self._record(parameter, gradient, produced=False)

    def seen(self, tree: ModelTree) -> Mapping[str, GradientRecord]:
        """The gradients of each parameter that received any, by name."""
        found = {name: self._seen.get(id(parameter)) for name, parameter in tree.parameters}
        return {name: one for name, one in found.items() if one is not None and one.sizes}

    def _on_gradient(self, parameter: Tensor, gradient: Tensor | None) -> None:
        if gradient is not None:  # autograd also calls hooks for undefined gradients, as behind repacked 4-bit weights
            self.arrived.add(id(parameter))
            self._record(parameter, gradient)

    def _on_accumulated(self, parameter: Tensor) -> None:
        self.arrived.add(id(parameter))
        self._on_gradient(parameter, parameter.grad)

    def _record(self, parameter: Tensor, gradient: Tensor, *, produced: bool = True) -> None:
        self.waiting.add(id(parameter))
        seen = self._seen.setdefault(id(parameter), GradientRecord())
        seen.after_updates = self.moved
        seen.produced = seen.produced and produced
        size = largest_magnitude(gradient)
        seen.sizes += [] if size is None else [size]


def _hook(hooks: ExitStack, parameter: Tensor, noted: Any) -> None:
    """Hook a parameter, including one that starts to train later in the step."""
    trains = parameter.requires_grad
    with suppress(RuntimeError):  # a parameter that cannot train cannot be hooked
        try:
            hook_gradient(hooks, parameter.requires_grad_(True), noted)
        finally:
            parameter.requires_grad_(trains)


UNCHANGED_SHARE = 0.9
"""Share of the elements with a gradient that an update must leave unchanged to count as lost to rounding."""
MIN_UPDATES = 2
"""Minimum number of updates: only the value at the next update shows that an update was kept."""
MIN_AFTER_REVERT = 4
"""Number of updates after which an undone first update counts as an exception."""
MIN_ZERO_RATE_UPDATES = 3
"""Number of updates with a learning rate of zero after which no further one is awaited: a warm-up from zero has one."""
_NARROW = (torch.bfloat16, torch.float16)


@dataclass(slots=True, kw_only=True)
class ParameterUpdates:
    """One parameter of the adapter, its last known value, and the outcomes of the watched updates.

    For a sharded parameter, the value is the local part.
    """

    name: str
    tensor: Tensor
    by_method: bool
    """Whether its PEFT method writes to it between updates."""
    has_gradient: bool = False
    """Whether it had a nonzero gradient when an update could use it."""
    updates: int = 0
    """Updates by an optimizer that holds it."""
    updates_with_gradient: int = 0
    """Updates with a nonzero gradient that was produced for it."""
    moved: int = 0
    learnt: int = 0
    """Updates with a gradient that changed it."""
    ineffective: int = 0
    """Updates with a gradient and a nonzero learning rate that left nearly every element unchanged."""
    rounded_away: int = 0
    """Updates that changed nothing because their gradient is very small: the other factor has just left zero."""
    idle: int = 0
    """Ineffective updates that changed no parameter at all, although float32 could represent the change."""
    reverted: list[int] = field(default_factory=list)
    """Numbers (from 1) of the updates that were undone by the next update or by the end."""
    written: int = 0
    """Number of writes by something other than an update."""
    unreadable: str | None = None
    """Why its value could not be compared."""
    rate: float = 0.0
    """Largest learning rate for it."""
    _value: list[Tensor] = field(default_factory=list)
    _before: list[Tensor] = field(default_factory=list)
    """The value before the last update; empty after another write."""

    def __post_init__(self) -> None:
        self._keep(_parts(self.tensor), [])

    @property
    def is_reverted(self) -> bool:
        """Whether updates are undone, not counting the first: a projection may change the weights strongly once."""
        return bool(self.reverted) and (self.reverted[-1] > 1 or self.updates < MIN_AFTER_REVERT)

    @property
    def idling(self) -> bool:
        """Whether no update changed this or any other parameter."""
        return self.idle > 0 and not self.moved and self.idle == self.ineffective

    @property
    def has_zero_rate(self) -> bool:
        """Whether every learning rate was zero."""
        return self.updates > 0 and self.rate == 0.0

    @property
    def is_narrow(self) -> bool:
        """Whether rounding in its dtype may lose an update."""
        return self.tensor.dtype in _NARROW

    def is_kept(self) -> bool:
        """Whether its value is the last known one."""
        return all(_is_same(now, then) for now, then in zip(_parts(self.tensor), self._value, strict=True))

    def compare(self, *, stepping: bool) -> None:
        """Count writes by something other than an update, except while its optimizer is stepping, because SAM restores
        the weights.

        A projection after an update (a clamp, a norm) changes few weights, or all of them by less than the update.
        """
        try:
            if self.is_kept():
                return
            value = _parts(self.tensor)
            is_undone = bool(self._before) and self._reverts(value)
            self._keep(value, [])
            if not self.by_method and not stepping:
                self.written += 1
                self.reverted += [self.updates] if is_undone else []
        except Exception as error:  # not an error of the step, which continues
            self.unreadable = f"{type(error).__name__}: {error}"

    def record_update(self, rate: float) -> tuple[bool, bool]:
        """Record an update; returns whether it changed the value, and whether it failed to make an expected change."""
        try:
            moved = not self.is_kept()
            if moved:
                self._keep(_parts(self.tensor), self._value)
            rounded_away = self.has_gradient and bool(rate) and not moved and self._rounds_away(rate)
            ineffective = self.has_gradient and (self._is_rounded_away() if moved else bool(rate) and not rounded_away)
        except Exception as error:
            self.unreadable = f"{type(error).__name__}: {error}"
            return False, False
        self.moved += moved
        self.rounded_away += rounded_away
        self.ineffective += ineffective
        self.learnt += moved and self.has_gradient and not ineffective
        return moved, ineffective

    def _keep(self, value: list[Tensor], before: list[Tensor]) -> None:
        self._value = [part.clone() for part in value]
        self._before = before

    def _rounds_away(self, rate: float) -> bool:
        """Whether an update proportional to the gradient is too small to change a float32 value."""
        gradient = self.tensor.grad
        size = None if gradient is None or self.is_narrow else largest_magnitude(gradient)
        largest_value = max((float(part.abs().max()) for part in self._value if part.numel()), default=0.0)
        return size is not None and rate * float(size) < torch.finfo(self.tensor.dtype).eps * largest_value

    def _is_rounded_away(self) -> bool:
        """Whether the last update left nearly all elements with a gradient unchanged, because of a narrow dtype."""
        gradient = self.tensor.grad
        if not self.is_narrow or gradient is None or gradient.layout != torch.strided:
            return False
        pairs = [(one != 0, moved) for one, moved in zip(_parts(gradient), self._moved(), strict=True)]
        with_gradient = sum(int(has.sum()) for has, _ in pairs)
        return sum(int((has & ~moved).sum()) for has, moved in pairs) > UNCHANGED_SHARE * with_gradient

    def _moved(self) -> list[Tensor]:
        """The elements that the last update changed."""
        return [now != then for now, then in zip(self._value, self._before, strict=True)]

    def _reverts(self, value: list[Tensor]) -> bool:
        """Whether a change is at least as large as the last update and reverts most of the updated elements."""
        is_large = _distance(self._value, self._before) <= _distance(value, self._value) * (1 + 1e-6)
        moved = self._moved()
        left = sum(int(((now == then) & one).sum()) for now, then, one in zip(value, self._value, moved, strict=True))
        return is_large and left < sum(int(one.sum()) for one in moved) / 2


def _distance(one: list[Tensor], other: list[Tensor]) -> float:
    """Euclidean distance of two values; equal parts may be infinite."""
    pairs = [(now, then) for now, then in zip(one, other, strict=True) if not torch.equal(now, then)]
    total: float = sum(float((now.double() - then.double()).square().sum()) for now, then in pairs) ** 0.5
    return total


def _is_same(now: Tensor, then: Tensor) -> bool:
    """Whether two tensors are equal, NaN being equal to NaN."""
    alike = (now.shape, now.dtype) == (then.shape, then.dtype)
    return torch.equal(now, then) or (
        alike and bool(now.isnan().any()) and torch.allclose(now, then, rtol=0.0, atol=0.0, equal_nan=True)
    )


def _parts(tensor: Tensor) -> list[Tensor]:
    """The local plain tensors of a tensor."""
    return [part for _, part in plain_parts(tensor.detach())]


class Updates:
    """Watches every optimizer that steps, with torch's global optimizer hooks.

    Args:
        tree: the model before the first update.
        gradients: gradients of its parameters.
    """

    def __init__(self, tree: ModelTree, gradients: Gradients) -> None:
        written = written_by_method(tree)
        self.gradients = gradients
        self.steps = 0
        self.optimizers: dict[int, OptimizerRecord] = {}
        self._parameters = {
            id(tensor): ParameterUpdates(name=name, tensor=tensor, by_method=id(tensor) in written)
            for name, tensor in trained_parameters(tree).items()
            if not tensor.is_meta
        }
        self._stepping = 0
        """Number of optimizer steps in progress: an optimizer may contain another, and its writes before the inner step
        are its own."""
        self._before_call = (0, 0)
        """Number of updates, and of parameters that had learnt, before the last call."""

    def by_name(self) -> dict[str, ParameterUpdates]:
        """The updates of each parameter, by name."""
        return {parameter.name: parameter for parameter in self._parameters.values()}

    def continues(self, tree: ModelTree) -> bool:
        """Whether the model still has the same parameters with the values after the last call."""
        here = {id(tensor): name for name, tensor in trained_parameters(tree).items() if not tensor.is_meta}
        known = self._parameters
        return here == {key: parameter.name for key, parameter in known.items()} and all(
            parameter.by_method or parameter.is_kept() for parameter in known.values()
        )

    def begin_call(self) -> None:
        """Store the counts before a call."""
        self._before_call, self._stepping = (self.steps, self._learnt()), 0

    def end_call(self) -> None:
        """Compare the values with those after the last update."""
        for parameter in self._parameters.values():
            parameter.compare(stepping=self._stepping > 0)

    def before(self, optimizer: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Global optimizer hook: no parameter has changed yet and, without a closure, the gradients are complete."""
        self._read_before(optimizer)
        self._stepping += 1
        closure = next((value for value in (*args[1:2], kwargs.get("closure")) if callable(value)), None)
        if closure is None:
            return None

        def watched(*arguments: Any, **options: Any) -> Any:
            self._record_updates(optimizer)  # some optimizers call the closure again after changing parameters
            result = closure(*arguments, **options)
            self._read_before(optimizer)
            return result

        return (
            tuple(watched if value is closure else value for value in args),
            {key: watched if value is closure else value for key, value in kwargs.items()},
        )

    def after(self, optimizer: Any) -> None:
        """Global optimizer hook: the optimizer's state exists from here on."""
        self._stepping = max(self._stepping - 1, 0)
        self._record_updates(optimizer)
        for parameter, rate in self._find_parameters(optimizer):
            parameter.updates += 1
            parameter.updates_with_gradient += parameter.has_gradient
            parameter.rate = max(parameter.rate, rate)
            parameter.has_gradient = False
            self.gradients.waiting.discard(id(parameter.tensor))
        self.optimizers[id(optimizer)] = describe_optimizer(optimizer)
        self.steps += 1

    def pending(self) -> bool:
        """Whether another call may be conclusive."""
        if not self.steps:  # no torch optimizer has stepped: another writer, or no update yet
            return not any(parameter.written for parameter in self._parameters.values())
        seen = [parameter for parameter in self._parameters.values() if parameter.updates]
        if not seen:
            return self.steps < MIN_UPDATES
        if any(
            parameter.updates < MIN_UPDATES or (parameter.is_reverted and parameter.reverted == [1])
            for parameter in seen
        ):
            return True
        steps, learnt = self._before_call
        progresses = self.steps == steps or self._learnt() > learnt
        # A warm-up may change nothing for some updates.
        warms_up = any(
            parameter.idling or (parameter.has_zero_rate and parameter.updates < MIN_ZERO_RATE_UPDATES)
            for parameter in seen
        )
        return (progresses or warms_up) and not all(parameter.learnt or parameter.rounded_away for parameter in seen)

    def _learnt(self) -> int:
        return sum(parameter.learnt > 0 for parameter in self._parameters.values())

    def _find_parameters(self, optimizer: Any) -> list[tuple[ParameterUpdates, float]]:
        """The adapter's parameters that an optimizer updates, with their learning rates."""
        rates = {id(value): learning_rate(group) for group in optimizer.param_groups for value in group["params"]}
        return [(self._parameters[key], rate) for key, rate in rates.items() if key in self._parameters]

    def _read_before(self, optimizer: Any) -> None:
        """Read the values, and the gradients that the update will use."""
        self.gradients.record_assigned()
        for parameter, _ in self._find_parameters(optimizer):
            parameter.compare(stepping=self._stepping > 0)
            gradient = parameter.tensor.grad if id(parameter.tensor) in self.gradients.waiting else None
            size = None if gradient is None else largest_magnitude(gradient)
            parameter.has_gradient = gradient is not None and (size is None or float(size) != 0)

    def _record_updates(self, optimizer: Any) -> None:
        """Record the changes of an update since the values were read."""
        found = [(parameter, *parameter.record_update(rate)) for parameter, rate in self._find_parameters(optimizer)]
        any_moved = any(moved for _, moved, _ in found)
        self.gradients.moved += any_moved
        for parameter, _, ineffective in found:
            parameter.idle += ineffective and not any_moved and not parameter.is_narrow
