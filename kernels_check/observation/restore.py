"""Leave a training run exactly as it was found.

Verifying takes real steps, so whatever a step changes is copied first and written back in place afterwards: trainable
parameters, buffers, gradients, train/eval modes, the generators of random numbers, and, from the moment an optimizer
first shows up, its state. Not covered, because nothing announces them: learning-rate schedulers, gradient scalers
and data iterators that the step advances itself.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def synchronise() -> None:
    """Wait for the device, where one is in use; never initialises CUDA."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


class RandomState:
    """The generators of Python, NumPy (if loaded), torch on the CPU, and CUDA (if initialised)."""

    def __init__(self) -> None:
        numpy = sys.modules.get("numpy")
        self._python = random.getstate()
        self._numpy = numpy.random.get_state() if numpy is not None else None
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        """Set every generator back."""
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)

    def advanced(self) -> bool:
        """Whether torch drew random numbers since."""
        moved = not torch.equal(self._torch, torch.get_rng_state())
        if self._cuda is None:
            return moved
        pairs = zip(self._cuda, torch.cuda.get_rng_state_all(), strict=True)
        return moved or any(not torch.equal(before, now) for before, now in pairs)


class Modes:
    """The train/eval mode of every module."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in model.modules()]

    def restore(self) -> None:
        """Set every module back, one by one: ``model.train()`` would lose a mixture."""
        for module, training in self._modes:
            module.training = training


class _Cell:
    """A value and how to bring it back: tensors in place, so that everyone who holds them sees it."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self._copy = value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)

    def restored(self) -> Any:
        if isinstance(self._value, Tensor):
            self._value.detach().copy_(self._copy)
            return self._value
        return self._copy


class _OptimizerState:
    """State, parameter groups and plain attributes of one optimizer, as before its first watched step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._state = {key: _cells(value) for key, value in optimizer.state.items()}
        self._groups = [_cells({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups]
        # bitsandbytes keeps one-time switches such as `initialized` and `_cpu_paged_warned` as attributes.
        self._switches = {key: value for key, value in vars(optimizer).items() if isinstance(value, bool)}

    def restore(self) -> None:
        optimizer = self._optimizer
        for key in list(optimizer.state):
            if key not in self._state:
                _release(optimizer, optimizer.state.pop(key))
        for key, cells in self._state.items():
            _put_back(optimizer.state[key], cells)
        for group, cells in zip(optimizer.param_groups, self._groups, strict=True):
            _put_back(group, cells, keep=("params",))
        for name in [name for name, value in vars(optimizer).items() if isinstance(value, bool)]:
            if name in self._switches:
                setattr(optimizer, name, self._switches[name])
            else:
                delattr(optimizer, name)


def _cells(values: Any) -> dict[Any, _Cell]:
    return {key: _Cell(value) for key, value in values.items()}


def _put_back(target: Any, cells: dict[Any, _Cell], keep: tuple[str, ...] = ()) -> None:
    for key in [key for key in target if key not in cells and key not in keep]:
        del target[key]
    for key, cell in cells.items():
        target[key] = cell.restored()


def _release(optimizer: Any, state: Any) -> None:
    """Take new paged tensors off bitsandbytes' list, or its next prefetch would walk over freed state."""
    pages = getattr(getattr(optimizer, "page_mng", None), "paged_tensors", None)
    if pages and isinstance(state, dict):
        gone = {id(value) for value in state.values()}
        pages[:] = [tensor for tensor in pages if id(tensor) not in gone]


class Snapshot:
    """Everything a step of ``model`` may change, and the way back."""

    def __init__(self, model: nn.Module) -> None:
        synchronise()
        parameters = dict(model.named_parameters())
        self._values = {name: _Cell(value) for name, value in parameters.items() if value.requires_grad}
        self._buffers = [_Cell(buffer) for buffer in model.buffers() if not buffer.is_meta]
        self._gradients = [(value, value.grad, _Cell(value.grad)) for value in parameters.values()]
        self._trainable = [(value, value.requires_grad) for value in parameters.values()]
        self._copied = {id(value) for value in parameters.values() if value.requires_grad}
        self._optimizers: dict[int, _OptimizerState] = {}
        self._foreign: list[_Cell] = []
        self._modes = Modes(model)
        self.random = RandomState()

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Copy an optimizer's state; call before each of its steps, only the first call does anything."""
        if id(optimizer) in self._optimizers:
            return
        synchronise()
        self._optimizers[id(optimizer)] = _OptimizerState(optimizer)
        parameters = (value for group in optimizer.param_groups for value in group["params"])
        self._foreign += [_Cell(value) for value in parameters if self._may_change(value)]

    def _may_change(self, parameter: Tensor) -> bool:
        """Whether the update can change a parameter that was not copied: another model's, or one frozen until now."""
        return id(parameter) not in self._copied and (parameter.requires_grad or parameter.grad is not None)

    def changed(self) -> frozenset[str]:
        """Names of the trainable parameters whose values differ from the copy."""
        return frozenset(name for name, cell in self._values.items() if not torch.equal(cell._value, cell._copy))

    def restore(self) -> None:
        """Write everything back, to the bit."""
        synchronise()
        with torch.no_grad():
            for cell in (*self._values.values(), *self._buffers, *self._foreign):
                cell.restored()
            for parameter, gradient, cell in self._gradients:
                cell.restored()
                parameter.grad = gradient
            for state in self._optimizers.values():
                state.restore()
        for parameter, requires_grad in self._trainable:
            parameter.requires_grad_(requires_grad)
        self._modes.restore()
        self.random.restore()
        synchronise()


@contextmanager
def as_found(model: nn.Module) -> Iterator[Snapshot]:
    """Restore everything at the end of the block, also when it raises."""
    snapshot = Snapshot(model)
    try:
        yield snapshot
    finally:
        snapshot.restore()
