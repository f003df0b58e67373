"""See the operators of one step without a profiler.

Profiling a step costs several: the profiler starts up, traces, and hands over every event. A dispatch mode is called
for each operator below autograd instead and keeps the few that a judge reads, in the form in which the profiler's are
kept, so that both instruments are reduced and judged by the same code (``events``).

What makes it see backward passes: the engine gives each of its threads the thread-local state of the caller, dispatch
modes included (``at::ThreadLocalState``, member ``torch_dispatch_mode_state_``), so on CUDA, whose backward runs in
threads of its own, the mode is active too. What it cannot see: kernels, code that torch.compile made, CUDA graphs, and
libraries that call their kernels without an operator. ``blind`` lists the evidence that is left to the profiler then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from enum import Enum, auto
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, _pop_mode_temporarily

from kernels_check.check import Evidence
from kernels_check.observe.calls import CallRecorder
from kernels_check.observe.compilations import compiler_held
from kernels_check.observe.events import StepProfile, reduce_operators
from kernels_check.observe.module_tree import every_parameter
from kernels_check.observe.monkeypatch import patched
from kernels_check.observe.operators import (
    BACKWARD_ROOT,
    FOURBIT,
    MASKING,
    OPTIMIZER_ROOT,
    PRODUCTS,
    SOFTMAX,
    Operator,
    ancestors,
)
from kernels_check.observe.updates import Write, write, writes
from kernels_check.rules import attention_backend

_MATH = "aten::_scaled_dot_product_attention_math"
_OVER_SCORES = SOFTMAX | MASKING
_KEYS = {"cpu": torch._C.DispatchKey.CPU, "cuda": torch._C.DispatchKey.CUDA}

_BEFORE_ENTRY = "_is_skip_guard_eval_unsafe_stance"
"""What Dynamo asks on the way into compiled code, before it looks at which modes are active."""
_OPERATORS: tuple[Evidence, ...] = ("attention", "recomputation", "update", "products", "product_paths")
_COMPILED = "the step enters code of torch.compile, whose operators a dispatch mode does not see"


class _Role(Enum):
    """What the spy does with an operator."""

    FOURBIT = auto()
    ATTENTION = auto()
    PRODUCT = auto()
    OVER_SCORES = auto()
    OTHER = auto()


_OTHER = _Role.OTHER


class DispatchRecorder(TorchDispatchMode):
    """Keeps the operators that tell something; use ``spied``."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would wrap the method below twice against being compiled, and nothing is compiled in ``spied``."""
        return False

    def __init__(self, calls: CallRecorder) -> None:
        super().__init__()
        self._calls = calls
        self.operators: list[Operator] = []
        self.writes: list[Write] = []
        self.compiled_calls = 0
        self.left_behind = False
        """Whether it was taken off in another thread than the one that it is in."""
        self._enclosing: list[Operator] = []
        """Attention functions and 4-bit products being executed, and the optimizer's step."""
        self._backward: Operator | None = None
        """The backward pass, as what was called in it last knows it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the operator where it matters and call it."""
        kwargs = kwargs or {}
        name, role, writing = _KNOWN.get(func) or _known(func)
        if role is _OTHER and not self._enclosing:  # most of them: views, casts, sums
            return func(*args, **kwargs)
        enclosing = self._enclosing[-1].name if self._enclosing else ""
        if writing and enclosing == OPTIMIZER_ROOT and self._updates():
            self.writes.append(write(name, args))
        if role is _Role.FOURBIT:
            return self._look_inside(func, self._note(name, args), args, kwargs)
        if role is _Role.ATTENTION:
            self._note(name, _inputs(func, args, kwargs))
        elif role is _Role.PRODUCT:
            self._note(name, args)
        elif role is _Role.OVER_SCORES:
            self._note_scores(name, args)
        elif enclosing in FOURBIT:
            self._note(name, ())
        return func(*args, **kwargs)

    def attention_function(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``scaled_dot_product_attention``: math is no operator of its own, only the absence of a fused one."""

        def scaled_dot_product_attention(
            query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: Any = 0.0, is_causal: Any = False,
            **options: Any,
        ) -> Any:  # fmt: skip
            inputs = (query, key, value, attn_mask, dropout_p, is_causal)
            outer = self._note("aten::scaled_dot_product_attention", inputs)
            first = len(self.operators)
            self._enclosing.append(outer)
            try:
                return original(query, key, value, attn_mask, dropout_p, is_causal, **options)
            finally:
                self._enclosing.remove(outer)
                inside = self.operators[first:]
                if not any(map(_attends, inside)):  # none ran here: a selective checkpoint gives back what it kept
                    del self.operators[first - 1]
                elif {attention_backend(operator.name) for operator in inside} <= {None, "math"}:
                    outer.name = _MATH
                    dtypes = (_autocast(tensor) for tensor in (query, key, value))
                    outer.input_dtypes = (*dtypes, *outer.input_dtypes[3:])

        return scaled_dot_product_attention

    def before_update(self, *_: Any) -> None:
        """Optimizer hook: what follows belongs to the update."""
        self._enclosing.append(Operator(OPTIMIZER_ROOT, parent=self._surrounding()))

    def after_update(self, *_: Any) -> None:
        """Optimizer hook."""
        self._enclosing.pop()

    def _surrounding(self) -> Operator | None:
        """The innermost known caller, with the backward pass between where it began before that."""
        inner = self._enclosing[-1] if self._enclosing else None
        if torch._C._current_graph_task_id() == -1:
            return inner
        if any(caller.name == BACKWARD_ROOT for caller in (() if inner is None else (inner, *ancestors(inner)))):
            return inner
        if self._backward is None or self._backward.parent is not inner:
            self._backward = Operator(BACKWARD_ROOT, parent=inner)
        return self._backward

    def _updates(self) -> bool:
        """Whether what runs now is the optimizer's own, and not the forward or backward pass of its closure."""
        return torch._C._current_graph_task_id() == -1 and self._calls.current() is None

    def _note(self, name: str, inputs: Any) -> Operator:
        parent = self._surrounding()
        shapes: list[Any] = []
        dtypes: list[str] = []
        concrete: list[Any] = []
        for value in inputs:
            tensor = isinstance(value, Tensor)
            shapes.append(tuple(value.shape) if tensor else ())
            dtypes.append(_short(value.dtype) if tensor else "")
            concrete.append(None if tensor else value)
        kept = tuple(shapes), tuple(dtypes), tuple(concrete)  # of which the garbage collector takes no notice
        operator = Operator(name, *kept, parent, call=self._calls.current())
        if parent is not None:
            parent.add_child(operator)
        self.operators.append(operator)
        return operator

    def _note_scores(self, name: str, args: Any) -> None:
        """Attention written out: a softmax over three dimensions or more, and the masks laid over such scores."""
        if not any(isinstance(value, Tensor) and value.dim() >= 3 for value in args):
            return
        if name == "aten::_softmax_backward_data":
            node = torch._C._current_autograd_node()
            if node is not None and attention_backend(node.name()) is not None:
                self._note(node.name(), args)  # the softmax inside another implementation: its node is the trace
                return
        self._note(name, args)

    def _look_inside(self, func: Any, product: Operator, args: Any, kwargs: Any) -> Any:
        """Call the kernel with the mode still active; an ordinary call would hide what the kernel calls."""
        key = _KEYS.get(args[0].device.type)
        if key is None:
            return func(*args, **kwargs)
        self._enclosing.append(product)
        try:
            with self:
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        finally:
            self._enclosing.remove(product)

    def profile(self, model: nn.Module) -> StepProfile:
        """Reduce what was seen as the profiler's events are."""
        on_cuda = is_on_cuda(model)
        seen = reduce_operators(self.operators, on_cuda=on_cuda, writes=self.writes)
        return replace(seen, blind=blind_to(seen, on_cuda=on_cuda, compiled=self.compiled_calls > 0))


@contextmanager
def spied(calls: CallRecorder) -> Iterator[DispatchRecorder]:
    """Watch the operators of the block, each with the call of a module that ``calls`` is at.

    No compilation is started inside: a compiler that meets a dispatch mode would give up on that code for good. Code
    that is compiled already may run, or run eagerly; either way its entry is counted.
    """
    spy = DispatchRecorder(calls)
    with ExitStack() as stack:
        stack.enter_context(entries_counted(spy))
        stack.enter_context(compiler_held())
        for handle in (
            register_optimizer_step_pre_hook(spy.before_update),
            register_optimizer_step_post_hook(spy.after_update),
        ):
            stack.push(handle)
        stack.enter_context(patched(torch.nn.functional, "scaled_dot_product_attention", spy.attention_function))
        stack.enter_context(spy)
        yield spy


@contextmanager
def unseen() -> Iterator[None]:
    """Let a spy see nothing of the block, which is the check's own work: what it sees takes several times as long."""
    if isinstance(_get_current_dispatch_mode(), DispatchRecorder):
        with _pop_mode_temporarily():
            yield
    else:
        yield


@contextmanager
def entries_counted(spy: DispatchRecorder, before: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Count entries into code of torch.compile.

    Args:
        spy: that keeps the count.
        before: called on the way into each, when nothing has been asked of the modes that are active.
    """

    def entered(ask: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            spy.compiled_calls += 1
            before()
            return ask(*args, **kwargs)

        return counted

    frames = import_module("torch._dynamo.eval_frame")  # any dispatch mode loads it at its first operator
    with patched(frames, _BEFORE_ENTRY, entered):
        yield


def is_on_cuda(model: nn.Module) -> bool:
    """Whether any parameter is: then kernels run that no spy sees."""
    return any(parameter.is_cuda for parameter in every_parameter(model))


def blind_to(seen: StepProfile, *, on_cuda: bool, compiled: bool) -> dict[Evidence, str]:
    """Evidence that a profile could have of this step and these operators are not, with the reason."""
    blind: dict[Evidence, str] = {"kernels": "only a profile records them"} if on_cuda else {}
    if compiled:
        return blind | dict.fromkeys(_OPERATORS, _COMPILED)
    if not on_cuda:
        return blind
    if not any(call.direction == "forward" for call in seen.attention):
        blind["attention"] = (
            "no attention operator was called: a CUDA graph or a library without operators, only kernels tell"
        )
    if not seen.writes:
        blind["update"] = "no update operator was called, only kernels tell"
    if any(call.path == "unknown" for call in seen.fourbit):
        blind["product_paths"] = "the inside of a 4-bit product was not seen, only kernels tell"
    return blind


def _attends(operator: Operator) -> bool:
    """Whether it is attention, or what math is made of."""
    return attention_backend(operator.name) is not None or operator.name in SOFTMAX or operator.name in PRODUCTS


def _inputs(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments in the order of the schema, which a dispatch mode is given without trailing defaults."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return list(args)
    rest = schema.arguments[len(args) :]
    return [*args, *(kwargs.get(argument.name, argument.default_value) for argument in rest)]


_KNOWN: dict[Any, tuple[str, _Role, bool]] = {}
"""Name and role of each operator that was met, and whether it writes what it is given: asked once, not in each call."""


def _known(func: Any) -> tuple[str, _Role, bool]:
    schema = getattr(func, "_schema", None)
    name: str = schema.name if schema is not None else str(func.name())
    _KNOWN[func] = found = (name, _role_of(name), writes(name))
    return found


def _role_of(name: str) -> _Role:
    if name in FOURBIT:
        return _Role.FOURBIT
    if attention_backend(name) is not None:
        return _Role.ATTENTION
    if name in PRODUCTS:
        return _Role.PRODUCT
    return _Role.OVER_SCORES if name in _OVER_SCORES else _Role.OTHER


@cache
def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(value: Any) -> str:
    return _short(value.dtype) if isinstance(value, Tensor) else ""


def _autocast(tensor: Tensor) -> str:
    """The dtype that autocast gives to an input of attention."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
    return _dtype(tensor)
