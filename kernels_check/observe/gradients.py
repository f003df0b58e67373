"""Gradients that the watched calls produced, told from those that lay there before.

``parameter.grad`` does not say when it was written: a step that produces none keeps the one of the step before, and
clipping scales that one in place. So each parameter carries a hook while it is watched. The hook sees a gradient as it
arrives, before it is added to anything, whether the backward pass is compiled, recomputed or distributed, and also
where an optimizer steps in the backward pass and drops the gradient at once. A sharded parameter of FSDP2 is the
exception: its gradient is put together outside of autograd, and it is told of it after it was written.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernels_check.observe.adapter_layers import adapter_parameters
from kernels_check.observe.module_tree import ModelTree, every_parameter, named_parameters
from kernels_check.observe.safe_hooks import HookGuard
from kernels_check.observe.tensor_copy import is_wrapper, plain_parts

_EXACT = (torch.float32, torch.bfloat16, torch.float16)
"""Types whose largest magnitude needs no wider one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSeen:
    """What reached one parameter over the watched calls."""

    nonzero: bool
    finite: bool
    produced: bool = True
    """Whether it was seen to arrive and could be read; else nobody knows what it is, such as one put there by hand."""
    after_updates: int = 0
    """Updates that had moved something of the adapter when the last one arrived."""


@dataclass(slots=True)
class Gradients:
    """Hooks on the parameters of a model, and what they saw."""

    reference: weakref.ref[nn.Module]
    shield: HookGuard
    """What hooks are wrapped in."""
    moved: int = 0
    """Updates that have moved something of the adapter; kept by who watches those."""
    arrived: set[int] = field(default_factory=set)
    """Parameters that a gradient reached since this was last cleared."""
    waiting: set[int] = field(default_factory=set)
    """Parameters that a gradient reached and that no update has taken since; kept by who watches those."""
    _sizes: dict[int, list[Tensor]] = field(default_factory=dict)
    """Largest magnitude of each gradient, left on its device so that nothing waits for it in the backward pass."""
    _after: dict[int, int] = field(default_factory=dict)
    _at_first: dict[int, Tensor | None] = field(default_factory=dict)
    """What lay there when the call began."""
    _by_hand: set[int] = field(default_factory=set)
    _unread: set[int] = field(default_factory=set)

    @property
    def model(self) -> nn.Module:
        """The model.

        Raises:
            RuntimeError: it no longer exists.
        """
        model = self.reference()
        if model is None:
            raise RuntimeError("the model no longer exists")
        return model

    @contextmanager
    def watched(self, tree: ModelTree) -> Iterator[None]:
        """Hook every parameter that trains or is an adapter's; all hooks are off afterwards, whatever raised."""
        own = adapter_parameters(tree)
        with ExitStack() as hooks:
            for name, parameter in named_parameters(tree):
                if parameter.requires_grad or (name in own and parameter.is_floating_point()):
                    hooks.callback(_take_off, parameter, parameter._backward_hooks)
                    _hook(hooks, parameter, self.shield(partial(self._arrive, parameter)))
                    if is_wrapper(parameter):
                        told = parameter.register_post_accumulate_grad_hook(self.shield(self._written))
                        hooks.push(told)
            yield

    def begin_call(self) -> None:
        """Note what lies there before a call."""
        self._at_first = {id(parameter): parameter.grad for parameter in every_parameter(self.model)}
        self.arrived.clear()

    def end_call(self) -> None:
        """Notice gradients that were put there by hand, and hold on to none that lay there before."""
        self.note_by_hand()
        self._at_first = {}

    def note_by_hand(self) -> None:
        """Count a gradient that no hook saw and that is another than before the call."""
        for parameter in every_parameter(self.model):
            if id(parameter) in self.arrived or parameter.grad is None or not self._at_first:
                continue
            if parameter.grad is not self._at_first.get(id(parameter)):
                self._by_hand.add(id(parameter))
                self._note(parameter, parameter.grad)

    def reached(self) -> frozenset[str]:
        """Names of the parameters that a gradient reached in the last call."""
        return frozenset(name for name, value in named_parameters(self.model) if id(value) in self.arrived)

    def seen(self) -> Mapping[str, GradientSeen]:
        """What reached each parameter, by name."""
        found = {}
        for name, parameter in named_parameters(self.model):
            key = id(parameter)
            if key not in self._sizes and key not in self._unread:
                continue
            sizes = [float(size) for size in self._sizes.get(key, ())]
            found[name] = GradientSeen(
                nonzero=any(size != 0 for size in sizes) or key in self._unread,
                finite=all(size < float("inf") for size in sizes),
                produced=key not in self._by_hand and key not in self._unread,
                after_updates=self._after.get(key, 0),
            )
        return found

    def _arrive(self, parameter: Tensor, gradient: Tensor) -> None:
        self.arrived.add(id(parameter))
        self._note(parameter, gradient)

    def _written(self, parameter: Tensor) -> None:
        self.arrived.add(id(parameter))
        if parameter.grad is not None:
            self._note(parameter, parameter.grad)

    def _note(self, parameter: Tensor, gradient: Tensor) -> None:
        key = id(parameter)
        self.waiting.add(key)
        self._after[key] = self.moved
        try:
            size = largest(gradient)
        except Exception:  # an exception in a hook would be the step's
            self._unread.add(key)
            return
        if size is not None:
            self._sizes.setdefault(key, []).append(size)


def largest(gradient: Tensor) -> Tensor | None:
    """Largest magnitude of the part of a gradient that is here, on its device; None where no part of it is here.

    It is zero where all are, infinite or not a number where any is.
    """
    plain = type(gradient) is Tensor and gradient.layout == torch.strided and gradient.numel()
    if plain and gradient.dtype in _EXACT:  # in one operator that nobody watches: there are hundreds in a backward pass
        with torch.no_grad():
            peak: Tensor = torch.linalg.vector_norm(gradient, float("inf"))
            return peak
    with torch.no_grad():
        gradient = gradient.detach()
        if gradient.layout == torch.sparse_coo:
            values: list[Tensor] = [gradient.coalesce().values()]
        elif gradient.layout != torch.strided:
            values = [gradient.values()]
        else:
            values = [part for _, part in plain_parts(gradient)]
        if not is_wrapper(gradient) and not values[0].numel():
            return values[0].new_zeros(()).float()  # a sparse gradient of no rows
        sizes = [torch.linalg.vector_norm(part.float(), float("inf")) for part in values if part.numel()]
        return torch.stack(sizes).amax() if sizes else None


def _hook(hooks: ExitStack, parameter: Tensor, noted: Any) -> None:
    """Hook a parameter, also one that trains only later in the step."""
    frozen = not parameter.requires_grad
    with suppress(RuntimeError):  # what cannot train cannot be hooked
        if frozen:
            parameter.requires_grad_(True)
        try:
            hooks.push(parameter.register_hook(noted))
        finally:
            if frozen:
                parameter.requires_grad_(False)


def _take_off(parameter: Tensor, before: Any) -> None:
    """Leave no empty dictionary of hooks behind where there was none."""
    if before is None and not parameter._backward_hooks:
        parameter._backward_hooks = None
