"""Records a step by torch's profiler and reduces it to what the judges need, such as what its optimizers wrote.

``profile.events()`` makes an object of some forty attributes of every record and links them all, which takes longer
than the steps of a small model. Fewer than a tenth of the raw records matter, so names come first.

Each operator that writes inside an optimizer's step is kept with the tensors that it wrote, and each parameter that
had a gradient is asked which of them wrote it. What clips gradients or counts steps writes no parameter. The backward
pass of a closure is left out.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from kernels_check.observe.calls import MARK, number_of
from kernels_check.observe.modules import synchronise
from kernels_check.observe.operators import (
    BACKWARD_ROOT,
    COMPILED_REGION,
    COMPILER_LOOKUP,
    FOURBIT,
    MASKING,
    OPTIMIZER_ROOT,
    PRODUCTS,
    REDUCTIONS,
    SHAPED,
    SOFTMAX,
    AttentionCall,
    Operator,
    Product,
    attention_calls,
    fourbit_products,
    in_backward,
    matters,
    plain_products,
    region_of,
)
from kernels_check.rules import attention_backend, classify


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSeen:
    """One optimizer that stepped, as it stood after its last watched step."""

    classes: tuple[str, ...]
    """Qualified names of its class and every base class, the class first."""
    learning_rates: tuple[float, ...]
    parameters: frozenset[int]
    """Identities of the parameters it updates."""
    state_bytes: int
    paged_bytes: int
    """Bytes of the state tensors that really live in paged (managed) memory."""
    claims_paged: bool
    """The optimizer's own flag, which stays true where nothing is paged."""
    fused_requested: bool | None
    on_cpu: bool


def describe(optimizer: Any) -> OptimizerSeen:
    """Read an optimizer as it is now."""
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    # Quantisation maps are shared between the states of many parameters: count each tensor once.
    tensors = {id(value): value for state in optimizer.state.values() for value in _tensors(state)}.values()
    size = {id(value): value.numel() * value.element_size() for value in tensors}
    return OptimizerSeen(
        classes=class_names(optimizer),
        learning_rates=tuple(rate_of(group) for group in optimizer.param_groups),
        parameters=frozenset(map(id, parameters)),
        state_bytes=sum(size.values()),
        paged_bytes=sum(size[id(value)] for value in tensors if getattr(value, "is_paged", False) is True),
        claims_paged=bool(getattr(optimizer, "is_paged", False)),
        fused_requested=optimizer.defaults.get("fused"),
        on_cpu=all(value.device.type == "cpu" for value in parameters),
    )


def class_names(optimizer: Any) -> tuple[str, ...]:
    """Qualified names of its class and every base class, the class first."""
    return tuple(f"{kind.__module__}.{kind.__qualname__}" for kind in type(optimizer).__mro__)


def rate_of(group: Any) -> float:
    """Learning rate of one group; an optimizer that finds it by itself says none, which counts as one."""
    try:
        return abs(float(group.get("lr", 1.0)))
    except (TypeError, ValueError, RuntimeError):
        return 1.0


def _tensors(state: Any) -> list[Tensor]:
    values = state.values() if isinstance(state, dict) else ()
    return [value for value in values if isinstance(value, Tensor)]


LIBRARY_UPDATE = "bitsandbytes::optimizer"
KINDS = (("aten::_fused_", "fused"), ("aten::_foreach_", "foreach"), (LIBRARY_UPDATE, "bitsandbytes"))
UNSEEN = "unseen"

Identity = tuple[int, int]
"""Addresses of a tensor and of its storage; 0 for what has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """One operator inside an optimizer's step that wrote tensors."""

    op: str
    tensors: tuple[Identity, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSeen:
    """One group of an optimizer that stepped in the watched call."""

    optimizer: str
    """Class of the optimizer, by its short name."""
    index: int
    has_fused: bool
    """Whether its class takes a switch ``fused`` at all."""
    built_with: bool
    """Whether it was built with that switch on, whatever the group says now."""
    parameters: tuple[Identity, ...]
    """Those that had a gradient."""


def writes(name: str) -> bool:
    """Whether an operator of this name writes its first argument, or is a library's update."""
    return (name.startswith("aten::") and name.endswith("_")) or name.startswith(LIBRARY_UPDATE)


def identity(tensor: Tensor) -> Identity:
    """Of a tensor in this process."""
    storage = 0
    with suppress(RuntimeError):  # a sparse or opaque tensor has no storage; it is known by its address alone
        storage = tensor.untyped_storage().data_ptr()
    return int(tensor._cdata), storage


def recorded_writes(roots: Iterable[Any], mark: str) -> Iterator[Write]:
    """The writes of a profile, from the roots of its tree of events.

    Args:
        roots: as ``experimental_event_tree`` gives them.
        mark: how the record of a module's call begins: there is no update in one.
    """
    for event in roots:
        if event.name.startswith(OPTIMIZER_ROOT):
            yield from _inside(event, mark)
        elif _is_range(event, mark):
            yield from recorded_writes(event.children, mark)


def groups_of(optimizer: Any, before: Collection[int] = ()) -> tuple[GroupSeen, ...]:
    """The groups of an optimizer, right after its step.

    Args:
        optimizer: it.
        before: identities of the parameters that had a gradient before the step.
    """
    return tuple(
        GroupSeen(
            optimizer=type(optimizer).__name__,
            index=index,
            has_fused="fused" in optimizer.defaults,
            built_with=bool(optimizer.defaults.get("fused")),
            parameters=tuple(
                identity(value) for value in group["params"] if value.grad is not None or id(value) in before
            ),
        )
        for index, group in enumerate(optimizer.param_groups)
    )


def with_gradient(optimizer: Any) -> frozenset[int]:
    """Identities of an optimizer's parameters that have a gradient now."""
    return frozenset(
        id(value) for group in optimizer.param_groups for value in group["params"] if value.grad is not None
    )


def updated_by(groups: Sequence[GroupSeen], written: Iterable[Write]) -> list[Counter[str]]:
    """For each group, how many of its parameters were updated by each kind; ``unseen`` where none is known."""
    kinds: dict[int, set[str]] = {}
    for one in written:
        kind = next((kind for prefix, kind in KINDS if one.op.startswith(prefix)), "loop")
        for address, storage in one.tensors:
            kinds.setdefault(address, set()).add(kind)
            if storage:
                kinds.setdefault(-storage, set()).add(kind)
    alone = Counter(storage for _, storage in {one for group in groups for one in group.parameters})
    counts, counted = [], set[Identity]()
    for group in groups:  # an optimizer that wraps another has the same parameters
        own = [one for one in group.parameters if one not in counted]
        counts.append(Counter(_kind(kinds, address, at if alone[at] == 1 else 0) for address, at in own))
        counted.update(own)
    return counts


def operators_on(groups: Iterable[GroupSeen], written: Iterable[Write]) -> list[str]:
    """The operators that wrote any parameter of the groups, once for each call."""
    addresses = {address for group in groups for one in group.parameters for address in one if address}
    return [one.op for one in written if any(not addresses.isdisjoint(tensor) for tensor in one.tensors)]


def _kind(kinds: Mapping[int, set[str]], address: int, storage: int) -> str:
    found = kinds.get(address) or (kinds.get(-storage, set()) if storage else set())
    return next((kind for kind in ("fused", "bitsandbytes", "foreach", "loop") if kind in found), UNSEEN)


def _inside(root: Any, mark: str) -> Iterator[Write]:
    for event in root.children:
        if _is_range(event, mark):
            yield from _inside(event, mark)
        elif writes(event.name):
            inputs = getattr(event.extra_fields, "inputs", ())
            given = inputs if event.name.startswith(LIBRARY_UPDATE) else inputs[:1]
            yield Write(op=event.name, tensors=tuple(_recorded(given)))


def _is_range(event: Any, mark: str) -> bool:
    """Whether it is a range that a program opened, and not an operator, a backward pass or the call of a module."""
    scope = getattr(event.extra_fields, "scope", None)
    return getattr(scope, "name", "") == "USER_SCOPE" and not event.name.startswith((mark, BACKWARD_ROOT))


def _recorded(inputs: Iterable[Any]) -> Iterator[Identity]:
    for one in inputs:
        if isinstance(one, list | tuple):
            yield from _recorded(one)
        elif hasattr(one, "impl_ptr"):
            yield int(one.impl_ptr or 0), int(one.storage_data_ptr or 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """What one watched step executed."""

    attention: tuple[AttentionCall, ...]
    fourbit: tuple[Product, ...]
    """Products with a 4-bit weight, in the forward pass or recomputed for the backward pass."""
    products: tuple[Product, ...] = ()
    """All others of the forward pass."""
    mixing: frozenset[int] = frozenset()
    """Numbers of the module calls of the forward pass with a batched product, or a softmax of at least 3 dimensions."""
    reductions: frozenset[int] = frozenset()
    """The same with a sum or an exponential, from which attention could be written out element by element."""
    writes: tuple[Write, ...] = ()
    """What wrote tensors inside the steps of optimizers."""
    kernels: Mapping[str, int]
    """Launches of each kernel rule (see ``rules``); empty without CUDA."""
    compiled_regions: int = 0
    """Regions of torch.compile that were entered in either pass."""
    compiler_lookups: int = 0
    """Look-ups in the compiler's cache; without a compiled region they mean that the code ran eagerly after all."""
    entered: tuple[int | None, ...] = ()
    """For each region of the forward pass the module call that it was entered in; None outside the model."""
    eager: frozenset[int] = frozenset()
    """Numbers of the module calls in which products or attention of the forward pass ran outside of any region."""
    missing: str | None = None
    """Why nothing was recorded, so that whatever rests on operators is unknown."""


def reduce_operators(
    operators: list[Operator],
    *,
    kernels: Iterable[str] = (),
    writes: Iterable[Write] = (),
) -> StepProfile:
    """Reduce what one step called on the host, and the names of the kernels that it launched.

    Args:
        operators: those that ``matters`` keeps, each linked to its nearest kept caller.
        kernels: names as the profiler spells them.
        writes: inside the steps of optimizers.
    """
    rules = [classify(name) for name in kernels]
    regions = [operator for operator in operators if operator.name.startswith(COMPILED_REGION)]
    forward = [(one.call, one) for one in operators if one.call is not None and not in_backward(one)]
    return StepProfile(
        attention=tuple(attention_calls(operators)),
        fourbit=tuple(fourbit_products(operators, on_cuda=bool(rules))),
        products=tuple(plain_products(operators)),
        mixing=frozenset(call for call, one in forward if _mixes(one)),
        reductions=frozenset(call for call, one in forward if one.name in REDUCTIONS),
        writes=tuple(writes),
        kernels=Counter(rule.name for rule in rules if rule is not None),
        compiled_regions=len(regions),
        compiler_lookups=sum(one.name == COMPILER_LOOKUP for one in operators),
        entered=tuple(one.call for one in regions if not in_backward(one)),
        eager=frozenset(call for call, one in forward if _computes(one) and region_of(one) is None),
    )


def not_recorded(reason: str) -> StepProfile:
    """A profile without anything in it."""
    return replace(reduce_operators([]), missing=reason)


def _computes(event: Operator) -> bool:
    return event.name in PRODUCTS or event.name in FOURBIT or attention_backend(event.name) is not None


def _mixes(event: Operator) -> bool:
    """Whether it may mix tokens: what a router or a projection does is over fewer dimensions."""
    batched = event.name in ("aten::bmm", "aten::baddbmm")
    return batched or (event.name in SOFTMAX and len(event.shape(0)) >= 3)


AROUND = "a profiler of the program runs around this check, which another would end"
INSIDE = "the step runs a profiler of its own, which ends any other"


def profiled(call: Callable[[], object]) -> StepProfile | None:
    """Call under the profiler, with shapes, in all threads, and on CUDA with kernels.

    Returns:
        None where nothing was recorded: what was called runs a profiler of its own, which ends this one silently.
    """
    synchronise()
    recording = ProfilerRecording()
    with recording.opened():
        call()
    return recording.profile() if recording.lasted else None


class ProfilerRecording:
    """A profile between two moments of a program, such as those around a call; of all threads, with shapes."""

    def __init__(self) -> None:
        _let_forks_end()
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        everywhere: Any = {"experimental_config": _ExperimentalConfig(profile_all_threads=True)}
        self._profile = profile(activities=activities, record_shapes=True, **everywhere)
        self._another = False
        self._read: list[Any] = []
        """The raw events, which take long to hand over."""

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Record until the end of the block; a profiler that the program starts meanwhile ends this one, and goes on.

        Stopping this one then would end that of the program and take what it has recorded, so that it is let be.
        """
        profiler: Any = torch.autograd.profiler
        enable = profiler._enable_profiler

        def noticed(*args: Any, **kwargs: Any) -> Any:
            self._another = True
            return enable(*args, **kwargs)

        with patch.object(profiler, "_enable_profiler", noticed):
            with quiet_kineto():
                self._profile.start()
            self._another = False
            try:
                yield
            finally:
                if self.lasted:
                    with quiet_kineto():
                        synchronise()
                        self._profile.stop()

    @property
    def lasted(self) -> bool:
        """Whether no other was started since; after the block, whether it recorded anything."""
        return not self._another and (is_recording() or bool(self._events()))

    def profile(self) -> StepProfile:
        """What was recorded, where it ``lasted``."""
        operators, kernels = read_operators(self._events())
        results: Any = self._profile.profiler
        roots = results.kineto_results.experimental_event_tree()
        return reduce_operators(operators, kernels=kernels, writes=recorded_writes(roots, MARK))

    def _events(self) -> list[Any]:
        result: Any = getattr(self._profile.profiler, "kineto_results", None)
        if not self._read and result is not None:
            self._read = result.events()
        return self._read


@cache
def _let_forks_end() -> None:
    """Let processes that are forked from here end.

    The profiler leaves a thread behind, which a fork does not have, and the clean-up of the C++ libraries at its end
    would wait for that thread for ever: ``_exit`` with the same status comes before it.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "on_exit"):  # glibc
        os.register_at_fork(after_in_child=lambda: library.on_exit(library._exit, None))


def is_recording() -> bool:
    """Whether a profiler runs already, which another would end."""
    return bool(torch.autograd.profiler._is_profiler_enabled) or torch._C._autograd._profiler_enabled()


@contextmanager
def quiet_kineto() -> Iterator[None]:
    """Silence the two lines that Kineto writes to stderr per profile."""
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = "99"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("KINETO_LOG_LEVEL", None)
        else:
            os.environ["KINETO_LOG_LEVEL"] = before


def read_operators(events: Iterable[Any]) -> tuple[list[Operator], list[str]]:
    """Operators that matter, in the order in which they began, and the names of all kernels."""
    host, kernels = [], []
    for event in events:
        if event.device_type() == DeviceType.CPU:
            name = event.name()
            if (matters(name) or name.startswith(MARK)) and not _crosses_threads(event):
                host.append(event)
        elif event.device_type() == DeviceType.CUDA and not _is_mark(event):
            kernels.append(event.name())
    # Shapes take long to read, and those of what may lay a mask matter only where attention is written out.
    with_shapes = SHAPED | (MASKING if any(event.name() in SOFTMAX for event in host) else frozenset())
    return list(_nested(host, with_shapes)), kernels


def _crosses_threads(event: Any) -> bool:
    return bool(event.is_async()) or event.start_thread_id() != event.end_thread_id()


def _is_mark(event: Any) -> bool:
    """A user's annotation or a record of memory, and no launch."""
    return bool(event.is_user_annotation() or event.is_hidden_event()) or event.name().startswith("[")


def _nested(events: Iterable[Any], with_shapes: frozenset[str]) -> Iterator[Operator]:
    """Link each event to the innermost one of its thread that encloses it, and to the innermost call of a module.

    An operator that is written in Python, or that autocast calls anew with other inputs, is recorded twice, one record
    inside the other: the outer is kept, with the inputs of the inner.
    """
    order = sorted(events, key=lambda event: (event.start_thread_id(), event.start_ns(), -event.end_ns()))
    thread, around = None, list[tuple[int, Operator | None, int | None]]()
    for event in order:
        if event.start_thread_id() != thread:
            thread, around = event.start_thread_id(), []
        while around and event.end_ns() > around[-1][0]:
            around.pop()
        _, parent, call = around[-1] if around else (0, None, None)
        name = event.name()
        if name.startswith(MARK):
            around.append((event.end_ns(), parent, number_of(name)))
            continue
        if parent is not None and parent.name == name:
            parent.input_shapes, parent.input_dtypes = event.shapes(), event.dtypes()
            continue
        operator = Operator(name, parent=parent, call=call)
        if name in with_shapes or attention_backend(name) is not None:
            operator.input_shapes, operator.input_dtypes = event.shapes(), event.dtypes()
            operator.concrete_inputs = event.concrete_inputs()
        if parent is not None:
            parent.add_child(operator)
        around.append((event.end_ns(), operator, call))
        yield operator
