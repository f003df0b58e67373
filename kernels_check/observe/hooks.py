"""Hooks that change nothing of a step, and putting a training back as it was.

What fails in a hook is kept, and is no error of the step. torch.compile does not look into them. A module that is
copied or saved takes the hooks on it along: in the copy, and in the file, they do nothing and name nothing of this
project.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kernels_check.observe.modules import every_module, every_parameter

Hook: TypeAlias = Callable[..., Any]


def backward_task() -> int:
    """Number of the run of the autograd engine that this thread is in; -1 outside a backward pass."""
    return torch._C._current_graph_task_id()


class ModuleHook:
    """A hook on one module that notes calls of that module only, and not those of its copies.

    A shallow copy shares the dictionary in which its hooks lie, a deep copy has one of its own with copies of them. The
    replicas of ``DataParallel`` are the module itself: gradients come back from them to its parameters.

    Args:
        module: that it is registered on.
        hook: what is called for it.
    """

    def __init__(self, module: nn.Module, hook: Hook) -> None:
        self._module, self._hook = module, hook
        _keep_from_compiler(ModuleHook.__call__)

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        """As torch calls a hook of a module."""
        if module is self._module or getattr(module, "_is_replica", False):
            return self._hook(module, *given)
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        """Of a copy: what takes any arguments and does nothing."""
        return getattr, (nullcontext(), "__exit__")


class HookGuard:
    """Keeps the first fault of any of its hooks."""

    def __init__(self) -> None:
        self.fault: str | None = None

    def __call__(self, hook: Hook) -> Hook:
        """A hook that does the same and raises nothing; having failed, it changes nothing."""

        def shielded(*args: Any, **kwargs: Any) -> Any:
            try:
                return hook(*args, **kwargs)
            except Exception as error:
                self.fault = self.fault or f"{type(error).__name__}: {error}"
                return None

        _keep_from_compiler(shielded)
        return wraps(hook)(shielded) if hasattr(hook, "__name__") else shielded


def _keep_from_compiler(function: Any) -> None:
    """Let it neither compile a function nor look at what that calls."""
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


class _PatchedFunction:
    """Replaces a function, and calls what was made of it."""

    def __init__(self, original: Callable[..., Any], make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self.original, self._make = original, make
        self._made: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._made is None:
            self._made = self._make(self.original)
        return self._made(*args, **kwargs)

    def link(self, original: Callable[..., Any]) -> None:
        """Take another function for the original from here on."""
        self.original, self._made = original, None

    def end(self) -> None:
        """Call the original only, where a reference to this is still held."""
        self._made = self.original


@contextmanager
def patched(holder: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Put what ``make`` makes of an attribute in its place, for the length of the block."""
    ours = _PatchedFunction(getattr(holder, name), make)
    setattr(holder, name, ours)
    try:
        yield
    finally:
        _take_out(holder, name, ours)


def _take_out(holder: Any, name: str, ours: _PatchedFunction) -> None:
    outer = getattr(holder, name)
    if outer is ours:
        setattr(holder, name, ours.original)
    while isinstance(outer, _PatchedFunction):
        if outer.original is ours:
            outer.link(ours.original)
        outer = outer.original
    ours.end()


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
        self._modes = [(module, module.training) for module in every_module(model)]

    def restore(self) -> None:
        """Set every module back, one by one: ``model.train()`` would lose a mixture."""
        for module, training in self._modes:
            module.training = training


class _Parameters:
    """Values of the parameters that train, and gradients of all."""

    def __init__(self) -> None:
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        self._gradients: dict[int, tuple[Tensor, Tensor | None, Tensor | None]] = {}

    def add_gradient(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        self._gradients[id(parameter)] = parameter, gradient, None if gradient is None else gradient.detach().clone()

    def add_value(self, parameter: Tensor) -> None:
        if id(parameter) not in self._values:
            self._values[id(parameter)] = parameter, parameter.detach().clone()

    def restore(self) -> None:
        for parameter, value in self._values.values():
            if parameter.dtype == value.dtype and parameter.shape == value.shape:
                parameter.detach().copy_(value)
            else:  # bitsandbytes casts a bias in the first forward
                parameter.data = value
        for parameter, gradient, kept in self._gradients.values():
            if gradient is not None and kept is not None:
                gradient.copy_(kept)
            parameter.grad = gradient


class _OptimizerState:
    """State and parameter groups of one optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._state = [(parameter, state, _copied(state)) for parameter, state in optimizer.state.items()]
        self._groups = [(group, _copied(group)) for group in optimizer.param_groups]

    def restore(self) -> None:
        self._optimizer.state.clear()
        for parameter, state, kept in self._state:
            _put_back(state, kept)
            self._optimizer.state[parameter] = state
        self._optimizer.param_groups[:] = [group for group, _ in self._groups]
        for group, kept in self._groups:
            _put_back(group, kept)


def _copied(values: Any) -> dict[Any, tuple[Any, Any]]:
    """Each value, with a copy of it where it is a tensor."""
    return {
        key: (value, value.detach().clone() if isinstance(value, Tensor) else None)
        for key, value in values.items()
    }  # fmt: skip


def _put_back(values: Any, kept: dict[Any, tuple[Any, Any]]) -> None:
    values.clear()
    for key, (value, copy) in kept.items():
        if copy is not None:
            value.detach().copy_(copy)
        values[key] = value


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Restore a training at the end of the block, also when it raises.

    Restored are, to the bit: values of the parameters of ``model`` that require gradients, and of those that an
    optimizer updates in the block; gradients of all parameters of ``model``; state and parameter groups of every
    ``torch.optim.Optimizer`` that steps in the block; the generators of Python, NumPy and torch; the train/eval mode
    of every module. Nothing else is: neither buffers, frozen parameters and attributes of modules, nor schedulers,
    gradient scalers, data iterators and what a step counts in objects of its own.
    """
    synchronise()
    parameters, modes, numbers = _Parameters(), Modes(model), RandomState()
    for parameter in every_parameter(model):
        parameters.add_gradient(parameter)
        if parameter.requires_grad:
            parameters.add_value(parameter)
    states: dict[int, _OptimizerState] = {}

    def before_update(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) not in states:
            states[id(optimizer)] = _OptimizerState(optimizer)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.requires_grad or parameter.grad is not None:
                        parameters.add_value(parameter)

    handle = register_optimizer_step_pre_hook(before_update)
    try:
        yield
    finally:
        handle.remove()
        synchronise()
        with torch.no_grad():
            parameters.restore()
            for state in states.values():
                state.restore()
        modes.restore()
        numbers.restore()


def synchronise() -> None:
    """Wait for the device, where one is in use; never initialises CUDA."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
