"""Which module of the model was called, when, and by which other: the address of everything that is seen in a step.

A count of operators says nothing of where they ran: one layer that is called twice hides another that never ran. So
every module is hooked while a step is watched, each call is recorded with the call that it came from, and each
operator carries the call in which it ran. What carries none ran outside the model: in another model, in a copy, or in
code that torch.compile made, which calls no hook.

A pass that runs out of memory is taken again by a program that catches the error: what it called is no part of the
step, unless a gradient came back to anything that was returned inside it.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from kernels_check.observe.base import is_packed
from kernels_check.observe.hooks import HookGuard, ModuleHook, backward_task, patched
from kernels_check.observe.modules import named_modules

Output = tuple[int, "weakref.ref[Tensor]"]
"""A tensor that a gradient can come back to, with the number of the call that returned it."""


@dataclass(slots=True)
class BrokenCalls:
    """Calls that raised, and those that a gradient came back to in spite of it."""

    shield: HookGuard
    """What hooks are wrapped in."""
    raised: set[int] = field(default_factory=set)
    _used: set[int] = field(default_factory=set)
    _hooks: ExitStack = field(default_factory=ExitStack)

    def add(self, number: int, outputs: Iterable[Output]) -> None:
        """Note a call that raised, and ask what was returned inside it for gradients.

        Args:
            number: of the call.
            outputs: of the calls inside it.
        """
        self.raised.add(number)
        for inner, reference in outputs:
            tensor = reference()
            if tensor is not None:  # a freed tensor can only have led to one that is still held
                self._hooks.push(tensor.register_hook(self.shield(partial(self._come_back, inner))))

    def close(self) -> None:
        """Take the hooks off."""
        self._hooks.close()

    def failed(self, callers: Mapping[int, int | None]) -> frozenset[int]:
        """Numbers of all calls that came to nothing: those that raised, and those inside them.

        Args:
            callers: the caller of each call, by their numbers.
        """
        used = {around for number in self._used for around in _around(number, callers)}
        gone = self.raised - used
        if not gone:
            return frozenset()
        return frozenset(number for number in callers if not gone.isdisjoint(_around(number, callers)))

    def _come_back(self, number: int, gradient: Tensor) -> None:
        self._used.add(number)


def outputs_of(number: int, output: Any) -> Iterator[Output]:
    """The tensors of an output that a gradient can come back to."""
    if isinstance(output, Tensor):
        if output.requires_grad:
            yield number, weakref.ref(output)
    elif isinstance(output, Mapping):
        for one in output.values():
            yield from outputs_of(number, one)
    elif isinstance(output, list | tuple):
        for one in output:
            yield from outputs_of(number, one)
    elif hasattr(output, "__dict__"):
        for one in vars(output).values():
            if isinstance(one, Tensor):
                yield from outputs_of(number, one)


def _around(number: int | None, callers: Mapping[int, int | None]) -> Iterator[int]:
    while number is not None:
        yield number
        number = callers[number]


MARK = "lorameter.call#"
"""How the profiler's record of a module's call begins; the number of the call follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleCall:
    """One call of a module of the model."""

    names: tuple[str, ...]
    """Qualified names; several where the module is held in several places. ``""`` is the model itself."""
    caller: int | None
    """Number of the enclosing call; None for an entry into the model."""
    training: bool
    """The module's mode at that moment."""
    with_grad: bool
    """Whether gradients were being recorded, by autograd or by the autograd function that it ran in: a checkpoint of
    the reentrant kind switches them off and computes the module again."""
    in_backward: bool
    """Whether the autograd engine was running: the module is computed again for it (gradient checkpointing)."""
    thread: int
    """Identity of the Python thread."""
    compiled: bool = False
    """Whether the module is compiled in place: what it holds calls no hook."""

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


@dataclass(frozen=True, kw_only=True)
class Calls:
    """All calls of the model's modules in the watched call of the step, in the order in which they began."""

    all: tuple[ModuleCall, ...] = ()
    unhooked: frozenset[str] = frozenset()
    """Modules without a hook of their own: compiled in place, or of a kind that takes none."""
    thread: int | None = None
    """Identity of the thread that called the step."""
    modes: tuple[tuple[int, Mapping[str, bool]], ...] = ()
    """``training`` of every module at each entry into the model, with the number of that call."""
    differentiable: frozenset[int] = frozenset()
    """Numbers of the calls of the forward pass whose results a gradient can come back to."""
    cut: frozenset[int] = frozenset()
    """Numbers of the calls, in either pass, in which a gradient was lost: those of a 4-bit layer whose input requires
    one and whose weight lay as bitsandbytes repacks it for inference, where its product has no backward pass."""
    failed: frozenset[int] = frozenset()
    """Numbers of the calls of the forward pass that raised and came to nothing, and of those inside them."""

    @cached_property
    def relevant(self) -> frozenset[int]:
        """Numbers of the calls that a claim about training is about.

        A reference, an evaluation or a generation inside the step enters the model with gradients off; those calls are
        left out where any other entry records gradients, and so is what ``failed``. A step that records none at all is
        judged whole.
        """
        roots = [self._root(number) for number in range(len(self.all))]
        trains = {root for root in set(roots) if self.all[root].with_grad or self.all[root].in_backward}
        counted = frozenset(number for number, root in enumerate(roots) if not trains or root in trains)
        return counted - self.failed

    @cached_property
    def forward(self) -> tuple[int, ...]:
        """Numbers of the relevant calls of the forward pass: those that are no recomputation."""
        return tuple(number for number in sorted(self.relevant) if not self.all[number].in_backward)

    @cached_property
    def by_name(self) -> dict[str, list[int]]:
        """Numbers of the relevant calls in either pass, by each of the module's names."""
        found: dict[str, list[int]] = {}
        for number in sorted(self.relevant):
            for name in self.all[number].names:
                found.setdefault(name, []).append(number)
        return found

    def called(self, name: str, *, in_backward: bool = False) -> list[int]:
        """Numbers of the relevant calls of a module in one of the passes."""
        return [number for number in self.by_name.get(name, ()) if self.all[number].in_backward is in_backward]

    def ran(self, name: str) -> bool:
        """Whether a module was called in the forward pass."""
        return bool(self.called(name))

    def recomputed(self, name: str) -> bool:
        """Whether a module was called in the backward pass."""
        return bool(self.called(name, in_backward=True))

    def enclosing(self, number: int | None) -> Iterator[int]:
        """A call and those around it, the innermost first."""
        while number is not None:
            yield number
            number = self.all[number].caller

    def training(self) -> dict[str, bool | None]:
        """The mode of every module over the relevant calls; None where it changed."""
        seen: dict[str, set[bool]] = {}
        for number, modes in self.modes:
            if number in self.relevant:
                for name, mode in modes.items():
                    seen.setdefault(name, set()).add(mode)
        for name, numbers in self.by_name.items():
            seen[name] = {self.all[number].training for number in numbers}
        return {name: next(iter(modes)) if len(modes) == 1 else None for name, modes in seen.items()}

    @property
    def taken(self) -> bool:
        """Whether there is a log at all: of a step that compiles anew in each call there is none."""
        return self.thread is not None

    def _root(self, number: int) -> int:
        *_, root = self.enclosing(number)
        return root


@dataclass(slots=True)
class _OpenCall:
    """A call that is under way."""

    number: int
    module: nn.Module
    mark: Any
    handled: BaseException | None
    """The exception that was being handled when it began."""
    outputs: list[Output] = field(default_factory=list)
    """What was returned inside it."""


@dataclass(slots=True)
class CallRecorder:
    """Writes the log; one for each watched call of the step."""

    model: nn.Module
    shield: HookGuard
    """What hooks are wrapped in."""
    marked: bool = False
    """Whether each call is also marked in the profiler's records."""
    log: list[ModuleCall] = field(default_factory=list)
    unhooked: set[str] = field(default_factory=set)
    modes: list[tuple[int, dict[str, bool]]] = field(default_factory=list)
    differentiable: set[int] = field(default_factory=set)
    cut: set[int] = field(default_factory=set)
    thread: int = field(default_factory=threading.get_ident)
    broken: BrokenCalls = field(init=False)
    _local: threading.local = field(default_factory=threading.local)
    _lock: Any = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.broken = BrokenCalls(self.shield)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hook every module; all hooks are taken off, also if setting one or taking one off fails."""
        names: dict[int, list[str]] = {}
        modules: dict[int, nn.Module] = {}
        for name, module in named_modules(self.model, remove_duplicate=False):
            names.setdefault(id(module), []).append(name)
            modules[id(module)] = module
        with ExitStack() as hooks:
            hooks.callback(self.broken.close)
            for identity, module in modules.items():
                self._hook(module, tuple(names[identity]), hooks)
            yield

    def calls(self) -> Calls:
        """What was written."""
        return Calls(
            all=tuple(self.log),
            unhooked=frozenset(self.unhooked),
            thread=self.thread,
            modes=tuple(self.modes),
            differentiable=frozenset(self.differentiable),
            cut=frozenset(self.cut),
            failed=self.broken.failed({number: call.caller for number, call in enumerate(self.log)}),
        )

    def in_training(self) -> bool:
        """Whether the entry into the model that this thread is in records gradients, or computes again for them."""
        stack = self._stack()
        entry = self.log[stack[0].number] if stack else None
        return entry is None or entry.with_grad or entry.in_backward

    def break_off(self) -> None:
        """Close the calls of this thread that are under way: no hook will be called at their end."""
        stack = self._stack()
        while stack:
            _end_mark(stack.pop())

    def current(self) -> int | None:
        """Number of the innermost call in this thread."""
        stack = self._stack()
        return stack[-1].number if stack else None

    def _hook(self, module: nn.Module, names: tuple[str, ...], hooks: ExitStack) -> None:
        if module._compiled_call_impl is not None:
            # It would be compiled again with a hook, so what is compiled is called from here.
            self.unhooked.update(names)
            hooks.enter_context(patched(module, "_compiled_call_impl", partial(self._around, module, names)))
            return

        try:
            begun = ModuleHook(module, self.shield(partial(self._begun, names)))
            hooks.push(module.register_forward_pre_hook(begun, prepend=True))
            hooks.push(module.register_forward_hook(ModuleHook(module, self.shield(self._ended)), always_call=True))
        except (RuntimeError, AttributeError, TypeError):  # modules of TorchScript take no such hook
            self.unhooked.update(names)

    def _around(self, module: nn.Module, names: tuple[str, ...], original: Callable[..., Any]) -> Callable[..., Any]:
        """What calls a module that is compiled in place."""
        enter, leave = self.shield(self._enter), self.shield(self._leave)

        def through(*args: Any, **kwargs: Any) -> Any:
            enter(module, names, compiled=True)
            output = None
            try:
                output = original(*args, **kwargs)
                return output
            finally:
                leave(module, output)

        return through

    def _begun(self, names: tuple[str, ...], module: nn.Module, inputs: Any) -> None:
        """Forward pre-hook."""
        self._enter(module, names)

    def _ended(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Forward hook."""
        stack = self._stack()
        if stack and stack[-1].module is module and _loses_gradient(module, inputs):
            self.cut.add(stack[-1].number)
        self._leave(module, output)

    def _enter(self, module: nn.Module, names: tuple[str, ...], *, compiled: bool = False) -> None:
        stack = self._stack()
        in_backward = backward_task() != -1
        caller = stack[-1].number if stack else None
        context = None
        if not in_backward and not torch.is_grad_enabled() and (caller is None or self.log[caller].with_grad):
            context = _function_context()
        call = ModuleCall(
            names=names,
            caller=caller,
            training=module.training,
            with_grad=torch.is_grad_enabled() or context is not None,
            in_backward=in_backward,
            thread=threading.get_ident(),
            compiled=compiled,
        )
        with self._lock:  # two threads may call the model at once
            number = len(self.log)
            self.log.append(call)
        if context is not None and any(context.needs_input_grad):
            self.differentiable.add(number)
        if not stack and not in_backward:
            self.modes.append((number, {name: module.training for name, module in named_modules(self.model)}))
        mark: Any = None
        if self.marked:
            mark = torch._C._profiler._RecordFunctionFast(f"{MARK}{number}")
            mark.__enter__()
        stack.append(_OpenCall(number, module, mark, sys.exc_info()[1]))

    def _leave(self, module: nn.Module, output: Any) -> None:
        """Close the call, and those inside it at whose end no hook was called."""
        stack = self._stack()
        if not any(entry.module is module for entry in stack):
            return
        while stack:
            closed = stack.pop()
            _end_mark(closed)
            if closed.module is module:
                self._note_output(closed, output)
            if stack:
                stack[-1].outputs += closed.outputs
            if closed.module is module:
                return

    def _note_output(self, closed: _OpenCall, output: Any) -> None:
        """Note what a call gave back, if only an exception."""
        returned = tuple(outputs_of(closed.number, output)) if torch.is_grad_enabled() else ()
        closed.outputs += returned
        if returned:
            self.differentiable.add(closed.number)
        raised = sys.exc_info()[1] is not closed.handled
        if raised and not self.log[closed.number].in_backward:
            self.broken.add(closed.number, closed.outputs)

    def _stack(self) -> list[_OpenCall]:
        found: list[_OpenCall] | None = getattr(self._local, "stack", None)
        if found is None:
            found = self._local.stack = []
        return found


def _end_mark(closed: _OpenCall) -> None:
    if closed.mark is not None:
        closed.mark.__exit__(None, None, None)


def _function_context() -> Any:
    """The context of the autograd function whose forward is running in this thread, if one is."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_varnames[:1] == ("ctx",):
            context = frame.f_locals["ctx"]
            if isinstance(context, torch.autograd.function.FunctionCtx):
                return context
        frame = frame.f_back
    return None


def _loses_gradient(module: nn.Module, inputs: Any) -> bool:
    repacked = is_packed(getattr(module._parameters.get("weight"), "quant_state", None))
    wanted = repacked and any(isinstance(one, torch.Tensor) and one.requires_grad for one in inputs)
    return wanted and torch.is_grad_enabled()


def number_of(mark: str) -> int:
    """The number of the call that the profiler's record names."""
    return int(mark.removeprefix(MARK))
