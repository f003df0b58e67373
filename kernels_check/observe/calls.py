"""Records each call of a module of the model in a step, with its calling module, to locate every operator.

A count of operators does not show where they ran: one layer that is called twice hides another that never ran. So every
module has one pair of hooks while a step is watched, and each operator has the number of the call in which it ran.
Operators without a number ran outside the model: in another model, in a copy, or in compiled code, which calls no
hooks.

The recorder stores all calls (``Calls``), calls of the model itself with their arguments (``ModelCall``), and calls of
adapter layers (``LayerCall``): flags read before or after a step do not show what a call ran, because
``disable_adapter()`` around the forward pass restores them.

A program may catch an out-of-memory error and repeat the pass: the calls of the failed pass are not part of the step.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from traceback import walk_stack
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import _get_sequence_nr
from torch.utils import checkpoint
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from kernels_check.observe.adapter import AdapterLayer, adapter_layers
from kernels_check.observe.base import is_packed
from kernels_check.observe.loss import (
    BackwardPasses,
    LossReader,
    ModelCall,
    describe_call,
    entry_modules,
)
from kernels_check.observe.modules import (
    HookGuard,
    ModelTree,
    ModuleHook,
    backward_task,
    left_out_of_copies,
    modules_by_name,
    training_modes,
)
from kernels_check.observe.operators import FOURBIT, PRODUCTS

MARK = "lorameter.call#"
"""Prefix of the profiler's record of a module call; the number of the call follows."""


@dataclass(slots=True, kw_only=True)
class ModuleCall:
    """One call of a module of the model."""

    names: tuple[str, ...]
    """Qualified names; several if the module is held in several places. ``""`` is the model itself."""
    caller: int | None
    """Number of the enclosing call; None for an entry into the model."""
    entry: int = 0
    """Number of the entry into the model inside which it ran; its own for an entry."""
    with_grad: bool
    """Whether gradients were recorded, by autograd or by the autograd function in which the call ran: a reentrant
    checkpoint switches them off and recomputes the module."""
    in_backward: bool
    """Whether the autograd engine was running: the module is recomputed for it (gradient checkpointing)."""
    nodes: range = range(0)
    """Numbers of the autograd nodes that its thread created in it; without an end while the call is open."""
    takes_gradient: bool = False
    """Whether an argument can receive a gradient."""
    replays: bool = False
    """Whether it is a recomputation in which a selective checkpoint returns products that it saved."""
    differentiable: bool = False
    """Whether its output can receive a gradient."""
    cut: bool = False
    """Whether a gradient was lost in it: in a 4-bit layer whose input requires a gradient, if bitsandbytes has repacked
    the weight for inference, so that the product has no backward pass."""
    raised: bool = False
    """Whether it is an entry into the model that raised an exception in the forward pass."""
    modes: Mapping[str, bool] | None = None
    """``training`` of every module at the time of the call, for an entry into the model."""
    layers: Sequence[LayerCall] = ()
    """The adapter layer calls, if the module is an adapter layer; a prompt's model may be several."""

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


@dataclass(frozen=True, kw_only=True)
class Calls:
    """All calls of the model's modules in the watched call of the step, in the order in which they began."""

    all: tuple[ModuleCall, ...] = ()
    unhooked: frozenset[str] = frozenset()
    """Modules without hooks: compiled in place, or of a kind that does not accept hooks."""

    @cached_property
    def failed(self) -> frozenset[int]:
        """Numbers of the entries that raised, and of all calls inside them, whose results were discarded."""
        return frozenset(number for number, call in enumerate(self.all) if self.all[call.entry].raised)

    @cached_property
    def relevant(self) -> frozenset[int]:
        """Numbers of the calls that count for training.

        A reference, an evaluation or a generation inside the step enters the model with gradients off; these calls are
        left out if any other entry records gradients, and so are ``failed`` calls. If no entry records gradients, all
        calls count.
        """
        trains = {number for number, call in enumerate(self.all) if call.with_grad or call.in_backward}
        entries = {call.entry for call in self.all}
        trained = entries & trains or entries
        return frozenset(number for number, call in enumerate(self.all) if call.entry in trained) - self.failed

    @cached_property
    def forward(self) -> tuple[int, ...]:
        """Numbers of the relevant calls of the forward pass, without recomputations."""
        return tuple(number for number in sorted(self.relevant) if not self.all[number].in_backward)

    @cached_property
    def by_name(self) -> dict[str, list[int]]:
        """Numbers of the relevant calls in both passes, by each of the module's names."""
        found: dict[str, list[int]] = {}
        for number in sorted(self.relevant):
            for name in self.all[number].names:
                found.setdefault(name, []).append(number)
        return found

    def called(self, name: str) -> list[int]:
        """Numbers of the relevant calls of a module in the forward pass."""
        return [number for number in self.by_name.get(name, ()) if not self.all[number].in_backward]

    def ran(self, name: str) -> bool:
        """Whether a module was called in the forward pass."""
        return bool(self.called(name))

    def enclosing(self, number: int | None) -> Iterator[int]:
        """A call and its enclosing calls, innermost first."""
        while number is not None:
            yield number
            number = self.all[number].caller

    def around(self, numbers: Iterable[int | None]) -> set[int]:
        """Some calls and all their enclosing calls."""
        return {outer for number in numbers for outer in self.enclosing(number)}

    def training(self) -> dict[str, bool | None]:
        """The mode of every module at the relevant entries into the model; None if it changed."""
        seen: dict[str, bool | None] = {}
        for modes in (self.all[number].modes or {} for number in sorted(self.relevant)):
            seen |= {name: mode if seen.get(name, mode) is mode else None for name, mode in modes.items()}
        return seen


@dataclass(slots=True, kw_only=True)
class LayerCall:
    """One call of one adapter layer."""

    layer: str
    """Name of the layer."""
    active: tuple[str, ...]
    disabled: bool
    merged: bool
    with_gradients: bool
    without_training: bool = False
    """Whether the whole entry into the model records no gradients, like an evaluation or a reference."""
    ran: dict[str, float] = field(default_factory=dict)
    """Parts that ran in it, by name, with the dropout probability that was applied (0 in evaluation)."""

    @property
    def adapted(self) -> bool:
        """Whether the layer was set to use its adapter."""
        return bool(self.active) and not self.disabled and not self.merged


@dataclass(slots=True)
class _OpenCall:
    """A call in progress."""

    number: int
    module: nn.Module
    mark: Any
    handled: BaseException | None
    """The exception that was being handled when the call began."""
    model_call: ModelCall | None


class CallRecorder:
    """Records the calls of one step.

    Args:
        tree: the current model.
        guard: wraps each hook.
        marked: whether each call is also marked in the profiler's records.
    """

    def __init__(self, tree: ModelTree, guard: HookGuard, *, marked: bool) -> None:
        self._tree, self._guard, self._marked = tree, guard, marked
        self.backwards = BackwardPasses(tree)
        self.model_calls: list[ModelCall] = []
        self.layer_calls: dict[str, list[LayerCall]] = {}
        """Calls of each adapter layer, by layer name."""
        self._log: list[ModuleCall] = []
        self._unhooked: set[str] = set()
        self._entries = set(map(id, entry_modules(tree.model)))
        self._layers: dict[int, list[AdapterLayer]] = {}
        self._parts: dict[int, dict[str, str]] = {}
        """For each module, the names of the layers of which it is a part, each with the name of the part."""
        for layer in adapter_layers(tree):
            self._layers.setdefault(id(layer.module), []).append(layer)
            for name, part in layer.parts():
                self._parts.setdefault(id(part), {})[layer.name] = name
        self._open_model_calls: list[ModelCall] = []
        self._hooks = ExitStack()
        self._losses = LossReader(passes=self.backwards, hooks=self._hooks, guard=guard)
        self._local = threading.local()
        self._lock = threading.Lock()

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hook every module; all hooks are removed, even if adding or removing one fails."""
        names: dict[int, list[str]] = {}
        for name, module in modules_by_name(self._tree).items():
            names.setdefault(id(module), []).append(name)
        with self._hooks as hooks:
            hooks.enter_context(left_out_of_copies())
            for _, module in self._tree.modules:
                self._hook(module, tuple(names[id(module)]), hooks)
            yield

    def calls(self) -> Calls:
        """The calls of all modules; failed calls are removed from those of the model and of adapters."""
        calls = Calls(all=tuple(self._log), unhooked=frozenset(self._unhooked))
        counted = (call for number, call in enumerate(self._log) if number not in calls.failed)
        for layer in (layer for call in counted for layer in call.layers):
            self.layer_calls.setdefault(layer.layer, []).append(layer)
        self.model_calls = [call.without(calls.failed) for call in self.model_calls if call.number not in calls.failed]
        return calls

    def remove_step_hooks(self) -> None:
        """Remove the hooks within a step, and close the open calls of this thread."""
        stack = self._stack()
        while stack:
            stack.pop().mark.__exit__(None, None, None)
        self._hooks.close()

    def _hook(self, module: nn.Module, names: tuple[str, ...], hooks: ExitStack) -> None:
        if getattr(module.forward, "__func__", None) is nn.Module.forward:
            return  # a container, which cannot be called: half of the modules that LoRA adds
        if module._compiled_call_impl is not None:  # a hook would cause recompilation
            self._unhooked.update(names)
            return
        try:
            begun = ModuleHook(module, self._guard(partial(self._enter, names)))
            hooks.push(module.register_forward_pre_hook(begun, with_kwargs=True))
            hooks.push(module.register_forward_hook(ModuleHook(module, self._guard(self._leave)), always_call=True))
        except (RuntimeError, AttributeError, TypeError):  # TorchScript modules do not accept such hooks
            self._unhooked.update(names)

    def _enter(self, names: tuple[str, ...], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        stack = self._stack()
        in_backward, with_grad = backward_task() != -1, torch.is_grad_enabled()
        caller = stack[-1].number if stack else None
        is_off = not in_backward and not with_grad and (caller is None or self._log[caller].with_grad)
        context = _function_context() if is_off else None
        call = ModuleCall(
            names=names,
            caller=caller,
            with_grad=with_grad or context is not None,
            in_backward=in_backward,
            nodes=range(_get_sequence_nr(), sys.maxsize),
            takes_gradient=with_grad and (_requires_grad(args) or _requires_grad(kwargs)),
            replays=in_backward and _replays_saved_products(),
            differentiable=context is not None and any(context.needs_input_grad),
        )
        with self._lock:  # two threads may call the model at the same time
            number = len(self._log)
            self._log.append(call)
        if not stack and not in_backward:
            call.modes = training_modes(self._tree)
        call.entry = stack[0].number if stack else number
        entry = self._log[call.entry]
        call.layers = [
            LayerCall(
                layer=layer.name,
                active=layer.adapters,
                disabled=layer.disabled,
                merged=bool(layer.merged),
                with_gradients=with_grad,
                without_training=not (entry.with_grad or entry.in_backward),
            )
            for layer in self._layers.get(id(module), ())
        ]
        self._note_part(module, stack)
        model_call = None
        if id(module) in self._entries:
            model_call = describe_call(module, args, kwargs, number)
            if not in_backward:  # otherwise it is a recomputation
                (self._open_model_calls[-1].inside if self._open_model_calls else self.model_calls).append(model_call)
            self._open_model_calls.append(model_call)
        mark: Any = torch._C._profiler._RecordFunctionFast(f"{MARK}{number}") if self._marked else nullcontext()
        mark.__enter__()
        stack.append(_OpenCall(number, module, mark, sys.exc_info()[1], model_call))

    def _note_part(self, part: nn.Module, stack: list[_OpenCall]) -> None:
        """Count a part of an adapter for the layer in whose call it runs, since layers may share a part."""
        names = self._parts.get(id(part), {})
        around = (one for outer in reversed(stack) for one in self._log[outer.number].layers) if names else ()
        call = next((one for one in around if one.layer in names), None)
        if call is not None:
            probability = getattr(part, "p", None)
            dropped = float(probability) if isinstance(probability, float | int) and part.training else 0.0
            call.ran[names[call.layer]] = max(dropped, call.ran.get(names[call.layer], 0.0))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook: close the call, and inner calls whose end called no hook."""
        stack = self._stack()
        if not any(entry.module is module for entry in stack):
            return
        closed = None
        while closed is None or closed.module is not module:
            closed = stack.pop()
            closed.mark.__exit__(None, None, None)
            if closed.model_call is not None:
                self._open_model_calls.remove(closed.model_call)
        call, with_grad = self._log[closed.number], torch.is_grad_enabled()
        call.nodes = range(call.nodes.start, _get_sequence_nr())
        repacked = is_packed(getattr(module._parameters.get("weight"), "quant_state", None))
        call.cut = with_grad and repacked and any(isinstance(one, Tensor) and one.requires_grad for one in args)
        call.differentiable = call.differentiable or (with_grad and _requires_grad(output))
        call.raised = not stack and sys.exc_info()[1] is not closed.handled and not call.in_backward
        if closed.model_call is not None and not self._open_model_calls:
            self._losses.read(closed.model_call, output)

    def _stack(self) -> list[_OpenCall]:
        """The open calls of this thread."""
        found: list[_OpenCall] = vars(self._local).setdefault("stack", [])
        return found


def _requires_grad(output: Any) -> bool:
    """Whether any output of a module can receive a gradient."""
    if isinstance(output, Tensor):
        return output.requires_grad
    if isinstance(output, Mapping | list | tuple):
        return any(map(_requires_grad, output.values() if isinstance(output, Mapping) else output))
    return any(isinstance(one, Tensor) and one.requires_grad for one in getattr(output, "__dict__", {}).values())


def _replays_saved_products() -> bool:
    """Whether a selective checkpoint that has saved results of products recomputes what runs now in this thread."""
    recomputing = (
        one for one in _get_current_dispatch_mode_stack() if isinstance(one, checkpoint._CachedTorchDispatchMode)
    )
    saved = ((operator.name(), held) for mode in recomputing for operator, held in mode.storage.items())
    entries = (one for name, held in saved if name in PRODUCTS | FOURBIT for one in held.values())
    return any(one is not checkpoint._RECOMPUTE and one is not checkpoint._CONSUMED for one in entries)


def _function_context() -> Any:
    """The context of the autograd function whose forward runs in this thread, if there is one."""
    frames = (frame for frame, _ in walk_stack(sys._getframe()) if frame.f_code.co_name == "forward")
    contexts = (frame.f_locals["ctx"] for frame in frames if frame.f_code.co_varnames[:1] == ("ctx",))
    return next((one for one in contexts if isinstance(one, torch.autograd.function.FunctionCtx)), None)
