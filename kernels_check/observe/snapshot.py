"""Everything that a watched step may change, kept before it runs, and how to put each thing back.

The model is kept whole. What else there is comes to light in two ways: it can be reached from the step before that
runs, or an optimizer announces that it is about to update it. Tensors that are neither the model's nor an optimizer's
may be as large as a second model, so they are copied up to a limit; beyond it their version counters tell whether they
were changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from kernels_check.check import name_some
from kernels_check.observe.device import synchronise
from kernels_check.observe.module_tree import named_modules
from kernels_check.observe.object_snapshot import TRAINERS, ObjectSnapshot, Undo
from kernels_check.observe.random_state import RandomState
from kernels_check.observe.reachable_objects import reach
from kernels_check.observe.tensor_copy import TensorCopy, is_wrapper, size_bytes

COPIED_BYTES = 64 * 2**20
"""How much is copied of tensors that are neither the model's nor any optimizer's; the rest is only watched."""


class RestoreError(RuntimeError):
    """What could not be put back, after everything else was.

    Args:
        faults: what, in words, and why.
    """

    def __init__(self, faults: list[tuple[str, BaseException]]) -> None:
        self.faults = tuple(faults)
        named = name_some((f"{name} ({type(error).__name__}: {error})" for name, error in faults), "; ")
        super().__init__(f"not left as found, do not train on from here: {named}")


class Snapshot:
    """Everything a step of ``model`` may change, and the way back.

    Args:
        model: the model that the step trains.
        step: the step, to find what else it may change.

    Raises:
        ValueError: something of the model or of an optimizer cannot be copied and written back; it is named.
    """

    def __init__(self, model: nn.Module, step: Callable[[], object] | None = None) -> None:
        synchronise()
        self._picture = ObjectSnapshot()
        self._copies: dict[int, TensorCopy] = {}
        """Of the model and the gradients; of frozen parameters only where their bytes lie."""
        self._spared: dict[int, TensorCopy] = {}
        """Copies of tensors that are written to only if they differ: a graph somebody holds may need them unwritten."""
        self._watched: dict[int, tuple[str, Tensor, int]] = {}
        """Tensors that are not copied, with the number of changes they had seen."""
        self._left = COPIED_BYTES
        self._parameters: dict[int, Tensor] = {}
        self._gradients: list[tuple[str, Tensor, Tensor | None]] = []
        self._trains: list[tuple[str, Tensor, bool]] = []
        self._states: dict[int, list[tuple[str, Tensor]]] = {}
        """What each optimizer holds that is copied only when it first steps."""
        self._optimizers: dict[int, Any] = {}
        self._announced: set[int] = set()
        self._late: dict[int, TensorCopy] = {}
        """Copies made in the step, just before an update."""
        self._in_step = False
        self._refused: list[tuple[str, BaseException]] = []
        self._modules: dict[int, nn.Module] = {}
        with _plain_access():
            self._values = self._add_model(model)
            self.random = RandomState()
            for name, value in reach(step) if step is not None else ():
                self._found(value, name)

    def _add_model(self, model: nn.Module) -> dict[str, TensorCopy]:
        """Keep the model itself; return the copies of its trainable parameters."""
        new = self._new_modules(model)
        parameters, buffers = _tensors(new)
        for name, parameter in parameters:
            self._copies[id(parameter)] = TensorCopy(parameter, name, values=parameter.requires_grad)
        for name, buffer in buffers:
            if id(buffer) not in self._copies:
                self._copies[id(buffer)] = TensorCopy(buffer, name)
        for name, parameter in parameters:
            self._add_parameter(parameter, name)
        self._add_slots(new, "model")
        return {name: self._copies[id(value)] for name, value in parameters if value.requires_grad}

    def _new_modules(self, model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
        named = named_modules(model, prefix)
        new = [(name, module) for name, module in named if id(module) not in self._modules]
        self._modules |= {id(module): module for _, module in new}
        return new

    def _add_slots(self, modules: list[tuple[str, nn.Module]], title: str) -> None:
        for name, module in modules:
            for children in (module._parameters, module._buffers, module._modules):
                if isinstance(children, dict):
                    self._picture.add_names(children, name or title)
            self._picture.add_slots(module, name or title, self._found)

    def _add_parameter(self, parameter: Tensor, name: str) -> None:
        """Keep gradient, hooks and attributes of a parameter, and whether it trains, but not its values."""
        if id(parameter) in self._parameters:
            return
        self._parameters[id(parameter)] = parameter
        if not self._in_step:  # a gradient first seen in the step is the step's own, what was there before is not known
            gradient = parameter.grad
            if gradient is not None:
                self._copies[id(gradient)] = TensorCopy(gradient, f"gradient of {name}")
            self._gradients.append((name, parameter, gradient))
        self._trains.append((name, parameter, parameter.requires_grad))
        for held in (parameter._backward_hooks, parameter._post_accumulate_grad_hooks):
            if held is not None:
                self._picture.add_names(held, f"hooks of {name}")
        attributes = getattr(parameter, "__dict__", None)
        if attributes is not None and not is_wrapper(parameter):
            self._picture.add(attributes, name, self._found if parameter.requires_grad else self._of_frozen)

    def _of_frozen(self, value: Any, name: str) -> None:
        """What hangs on a frozen parameter, such as its scales, is as frozen as the parameter."""
        if not isinstance(value, Tensor):
            self._found(value, name)

    def _found(self, value: Any, name: str) -> None:
        """Keep something that a step may change and that is not the model's own."""
        if isinstance(value, Tensor):
            if isinstance(value, nn.Parameter) or (value.is_leaf and value.requires_grad):
                self._add_parameter(value, name)
            self._add_tensors([(name, value)])
        elif isinstance(value, nn.Module):
            if id(value) not in self._modules:
                self._add_other_model(value, name)
        elif isinstance(value, Optimizer):
            self._add_optimizer(value, name)
        elif isinstance(value, TRAINERS):
            self._picture.add_slots(value, name, self._found)
        else:
            self._picture.add(value, name, self._found)

    def _add_other_model(self, model: nn.Module, name: str) -> None:
        """Keep a second model: whole where it is small or an average, else what its optimizer announces."""
        new = self._new_modules(model, name)
        parameters, buffers = _tensors(new)
        for key, parameter in parameters:
            self._add_parameter(parameter, key)
        average = any(isinstance(module, AveragedModel) for _, module in new)  # which no optimizer announces
        self._add_tensors([*parameters, *buffers], always=average)
        self._add_slots(new, name)

    def _add_tensors(self, tensors: list[tuple[str, Tensor]], *, always: bool = False) -> None:
        """Copy tensors while there is room for all of them, else note how often each has been changed."""
        known = (self._copies, self._spared, self._watched)
        new = [(name, one) for name, one in tensors if not one.is_meta and not any(id(one) in kept for kept in known)]
        size = sum(size_bytes(tensor) for _, tensor in new)
        room = always or size <= self._left
        self._left -= size if room and not always else 0
        for name, tensor in new:
            with suppress(ValueError):  # of a kind that cannot be copied
                self._spared[id(tensor)] = TensorCopy(tensor, name, values=room)
            copied = room and id(tensor) in self._spared
            if not copied and not tensor.is_inference():
                self._watched[id(tensor)] = (name, tensor, tensor._version)

    def _add_optimizer(self, optimizer: Any, name: str) -> None:
        """Keep groups and attributes now; tensors of the state when it announces its first update."""
        if id(optimizer) in self._optimizers:
            return
        self._optimizers[id(optimizer)] = optimizer
        state = self._states[id(optimizer)] = []

        def found_state(value: Any, name: str) -> None:
            if isinstance(value, Tensor):
                if not is_wrapper(value) and value.layout != torch.strided:
                    TensorCopy(value, name)  # refused now rather than in the middle of the step
                state.append((name, value))
            else:
                self._found(value, name)

        self._picture.add(optimizer.state, f"state of {name}", found_state)
        self._picture.add_slots(optimizer, name, self._found)

    def watch(self, optimizer: Optimizer) -> None:
        """Copy what an update changes; call before each of an optimizer's steps, only the first call does anything."""
        if id(optimizer) in self._announced:
            return
        synchronise()
        name = type(optimizer).__name__
        self._in_step = True
        try:
            self._add_optimizer(optimizer, name)
            for key, value in self._states[id(optimizer)]:
                self._copy_now(value, key)
            for group in optimizer.param_groups:
                for place, parameter in enumerate(group["params"]):
                    if parameter.requires_grad or parameter.grad is not None:
                        self._copy_now(parameter, f"parameter {place} of {name}")
        except ValueError as error:
            self._refused.append((name, error))  # the step may keep it to itself
            raise
        self._announced.add(id(optimizer))

    def _copy_now(self, tensor: Tensor, name: str) -> None:
        known = self._copies.get(id(tensor)) or self._spared.get(id(tensor))
        if id(tensor) in self._late or (known is not None and known.has_values):
            return
        _, _, version = self._watched.get(id(tensor), (name, tensor, None))
        if version is None or version == tensor._version:
            self._late[id(tensor)] = TensorCopy(tensor, known.name if known is not None else name)
            self._watched.pop(id(tensor), None)

    def changed(self) -> frozenset[str]:
        """Names of the trainable parameters whose values differ from the copy."""
        return frozenset(name for name, copy in self._values.items() if copy.changed())

    def restore(self) -> None:
        """Put everything back.

        Raises:
            RestoreError: what could not be put back; all the rest has been.
        """
        faults = [*self._refused, *self.put_back()]
        if faults:
            error = RestoreError(faults)
            for _, fault in faults:
                if not isinstance(fault, Exception):  # somebody wants the process to end
                    fault.add_note(str(error))
                    raise fault
            raise error

    def put_back(self) -> list[tuple[str, BaseException]]:
        """Put everything back, whatever fails, and say what did."""
        faults: list[tuple[str, BaseException]] = []
        with torch.no_grad(), _plain_access():
            for name, undo in self._undos():
                try:
                    undo()
                except BaseException as error:
                    faults.append((name, error))
                    if not isinstance(error, Exception):
                        faults += _tried(name, undo)  # it was interrupted, which is no fault of its own
        return faults

    def _undos(self) -> Iterator[Undo]:
        yield "the device", synchronise
        yield from self._picture.undos()
        for copy in (*self._late.values(), *self._copies.values()):
            yield copy.name, copy.restore
        for copy in self._spared.values():
            yield copy.name, copy.restore_changed
        for name, tensor, version in self._watched.values():
            yield name, partial(_require_unchanged, tensor, version)
        for name, parameter, gradient in self._gradients:
            if parameter.grad is not gradient:
                yield f"gradient of {name}", partial(setattr, parameter, "grad", gradient)
        for name, parameter, trains in self._trains:
            if parameter.requires_grad != trains:
                yield f"requires_grad of {name}", partial(setattr, parameter, "requires_grad", trains)
            for hooks in (parameter._backward_hooks, parameter._post_accumulate_grad_hooks):
                if hooks and not self._picture.holds(hooks):
                    yield f"hooks of {name}", hooks.clear
        yield "the random numbers", self.random.restore
        yield "the device", synchronise


def _tried(name: str, undo: Callable[[], None]) -> list[tuple[str, BaseException]]:
    try:
        undo()
    except BaseException as error:
        return [(name, error)]
    return []


def _plain_access() -> Any:
    """Reading an attribute asks no class of tensors written in Python, which is slow and may say otherwise."""
    return torch._C.DisableTorchFunctionSubclass()


def _tensors(modules: list[tuple[str, nn.Module]]) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """Parameters and buffers of modules, each once, with their names."""
    found: tuple[dict[int, tuple[str, Tensor]], dict[int, tuple[str, Tensor]]] = ({}, {})
    for name, module in modules:
        both: Any = (module._parameters, module._buffers)
        for kept, tensors in zip(found, both, strict=True):
            for key, tensor in tensors.items():
                if tensor is not None:
                    kept.setdefault(id(tensor), (f"{name}.{key}" if name else key, tensor))
    return list(found[0].values()), list(found[1].values())


def _require_unchanged(tensor: Tensor, version: int) -> None:
    if tensor._version != version:
        raise RuntimeError("the step changed it in place; it was not copied, being too large or of no kind that can be")
