"""Records a step with torch's profiler and extracts what the judges need, such as the writes of its optimizers.

``profile.events()`` makes an object with about forty attributes for every record, which takes longer than the steps of
a small model. So the profiler's own tree is read. Less than a tenth of its records matter, so they are first filtered
by name.

Each operator that writes inside an optimizer's step is kept with the tensors that it wrote, and is then matched with
the parameters that had a gradient. Operators that clip gradients or count steps write no parameters. The backward pass
of a closure is left out.
"""

from __future__ import annotations

import ctypes
import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from inspect import unwrap
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._C._profiler import _EventType, _ExperimentalConfig
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from kernels_check.observe.calls import MARK
from kernels_check.observe.modules import synchronise
from kernels_check.observe.operators import (
    BACKWARD_ROOT,
    BATCHED_PRODUCTS,
    COMPILED_REGION,
    COMPILER_LOOKUP,
    FOURBIT,
    OPTIMIZER_ROOT,
    PRODUCTS,
    REDUCTIONS,
    SOFTMAX,
    AttentionCall,
    Operator,
    Product,
    attention_calls,
    fourbit_products,
    is_read,
    plain_products,
)
from kernels_check.rules import attention_backend, classify


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerRecord:
    """One optimizer that stepped, in its state after its last watched step."""

    classes: tuple[str, ...]
    """Qualified names of its class and every base class, the class first."""
    steps_by: str = ""
    """The one of these classes whose ``step`` runs."""
    learning_rates: tuple[float, ...]
    parameters: frozenset[int]
    """Ids of the parameters that it updates."""
    state_bytes: int
    paged_bytes: int
    """Bytes of the state tensors that are actually in paged (managed) memory."""
    claims_paged: bool
    """The optimizer's own flag, which is true even if nothing is paged."""
    fused_requested: bool | None
    on_cpu: bool


def describe_optimizer(optimizer: Any) -> OptimizerRecord:
    """Read the current state of an optimizer."""
    parameters = optimized_by(optimizer)
    states = [state.values() for state in optimizer.state.values() if isinstance(state, dict)]
    # Parameters share quantisation maps: count each tensor once.
    tensors = {id(value): value for state in states for value in state if isinstance(value, Tensor)}.values()
    return OptimizerRecord(
        classes=class_names(optimizer),
        steps_by=_name_class(_find_stepping(type(optimizer))),
        learning_rates=tuple(learning_rate(group) for group in optimizer.param_groups),
        parameters=frozenset(map(id, parameters)),
        state_bytes=sum(value.nbytes for value in tensors),
        paged_bytes=sum(value.nbytes for value in tensors if getattr(value, "is_paged", False) is True),
        claims_paged=bool(getattr(optimizer, "is_paged", False)),
        fused_requested=optimizer.defaults.get("fused"),
        on_cpu=all(value.device.type == "cpu" for value in parameters),
    )


def optimized_by(optimizer: Any) -> list[Tensor]:
    """The parameters of all groups of an optimizer."""
    return [value for group in optimizer.param_groups for value in group["params"]]


def class_names(optimizer: Any) -> tuple[str, ...]:
    """Qualified names of its class and every base class, the class first."""
    return tuple(map(_name_class, type(optimizer).__mro__))


def _name_class(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _find_stepping(kind: Any) -> Any:
    """The class of an optimizer that defines its ``step``; torch puts a wrapper of it into the class itself."""
    function = unwrap(kind.step)
    return next(one for one in reversed(kind.__mro__) if unwrap(vars(one).get("step", unwrap)) is function)


def learning_rate(group: Any) -> float:
    """Learning rate of one group; 1 for an optimizer without a rate, which adapts it itself."""
    with suppress(TypeError, ValueError, RuntimeError):
        return abs(float(group.get("lr", 1.0)))
    return 1.0


LIBRARY_UPDATE = "bitsandbytes::optimizer"
KINDS = (("aten::_fused_", "fused"), ("aten::_foreach_", "foreach"), (LIBRARY_UPDATE, "bitsandbytes"))
UNSEEN = "unseen"
_PRECEDENCE = ("fused", "bitsandbytes", "foreach", "loop")
"""Precedence of the kinds if several have written one parameter."""

Identity = tuple[int, int]
"""Addresses of a tensor and of its storage; 0 for a missing one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """One operator inside an optimizer's step that wrote tensors."""

    op: str
    tensors: tuple[Identity, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRecord:
    """One group of an optimizer that stepped in the watched call."""

    optimizer: str
    """Class of the optimizer, by its short name."""
    index: int
    has_fused: bool
    """Whether its class has an argument ``fused``."""
    built_with: bool
    """Whether it was built with ``fused``, regardless of the group's current value."""
    parameters: tuple[Identity, ...]
    """Parameters that had a gradient."""


def tensor_identity(tensor: Tensor) -> Identity:
    """Identity of a tensor in this process."""
    with suppress(RuntimeError):  # a sparse or opaque tensor has no storage and is identified by its address only
        return int(tensor._cdata), tensor.untyped_storage().data_ptr()
    return int(tensor._cdata), 0


def describe_groups(optimizer: Any, before: Collection[int]) -> tuple[GroupRecord, ...]:
    """The groups of an optimizer, right after its step.

    Args:
        optimizer: the optimizer.
        before: ids of the parameters that had a gradient before the step.
    """
    return tuple(
        GroupRecord(
            optimizer=type(optimizer).__name__,
            index=index,
            has_fused="fused" in optimizer.defaults,
            built_with=bool(optimizer.defaults.get("fused")),
            parameters=tuple(
                tensor_identity(value) for value in group["params"] if value.grad is not None or id(value) in before
            ),
        )
        for index, group in enumerate(optimizer.param_groups)
    )


def updated_by(groups: Sequence[GroupRecord], written: Iterable[Write]) -> list[Counter[str]]:
    """For each group, the number of its parameters updated by each kind of operator; ``unseen`` if the operator is
    unknown."""
    kinds: dict[int, str] = {}
    """By address, and by the negative address of the storage."""
    for op, key in ((one.op, key) for one in written for tensor, storage in one.tensors for key in (tensor, -storage)):
        kind = next((kind for prefix, kind in KINDS if op.startswith(prefix)), "loop")
        kinds[key] = min(kind, kinds.get(key, kind), key=_PRECEDENCE.index)
    alone = Counter(storage for _, storage in {one for group in groups for one in group.parameters})
    counts, counted = [], set[Identity]()
    for group in groups:  # an optimizer that wraps another one has the same parameters
        own = [one for one in group.parameters if one not in counted]
        by_storage = (kinds.get(-storage, UNSEEN) if storage and alone[storage] == 1 else UNSEEN for _, storage in own)
        counts.append(Counter(kinds.get(address, other) for (address, _), other in zip(own, by_storage, strict=True)))
        counted.update(own)
    return counts


def operators_on(groups: Iterable[GroupRecord], written: Iterable[Write]) -> list[str]:
    """The operators that wrote any parameter of the groups, once for each call."""
    addresses = {address for group in groups for one in group.parameters for address in one if address}
    return [one.op for one in written if any(not addresses.isdisjoint(tensor) for tensor in one.tensors)]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """Operators and kernels of one watched step."""

    attention: tuple[AttentionCall, ...] = ()
    fourbit: tuple[Product, ...] = ()
    """Products with a 4-bit weight, in the forward pass or recomputed for the backward pass."""
    products: tuple[Product, ...] = ()
    """All other products of the forward pass."""
    mixing: frozenset[int] = frozenset()
    """Numbers of the module calls of the forward pass with a batched product, or a softmax of at least 3 dimensions."""
    reductions: frozenset[int] = frozenset()
    """The same for module calls with a sum or an exponential, from which attention could be written out elementwise."""
    writes: tuple[Write, ...] = ()
    """Operators that wrote tensors inside optimizer steps."""
    kernels: Mapping[str, int] = field(default_factory=dict)
    """Launches of each kernel rule (see ``rules``); empty without CUDA."""
    compiled_regions: int = 0
    """Regions of torch.compile that were entered in either pass."""
    compiler_lookups: int = 0
    """Look-ups in the compiler's cache; without a compiled region they mean that the code ran eagerly."""
    entered: tuple[int | None, ...] = ()
    """For each region of the forward pass, the module call in which it was entered; None outside the model."""
    eager: frozenset[int] = frozenset()
    """Numbers of the module calls in which products or attention of the forward pass ran outside all regions."""
    evaluated: tuple[int, ...] = ()
    """Numbers of the autograd nodes that the backward passes ran, in order."""
    missing: str | None = None
    """Why nothing was recorded, so that all properties based on operators are unknown."""

    def reached(self, nodes: range) -> bool:
        """Whether a backward pass ran any of these autograd nodes."""
        place = bisect_left(self.evaluated, nodes.start)
        return place < len(self.evaluated) and self.evaluated[place] in nodes


AROUND = "the program already runs a profiler, which a second one would end"
INSIDE = "the step runs a profiler of its own, which ends any other"
KINETO_LEVEL = "KINETO_LOG_LEVEL"
SILENT = 99
"""Higher than the level of any message."""


class ProfilerRecording:
    """A profile between two moments of a program, such as around a call; of all threads, with shapes."""

    def __init__(self) -> None:
        self.missing = AROUND if is_recording() else None
        """Why nothing is recorded; None otherwise."""
        self._recorded: Any = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Record until the end of the block, unless the program runs a profiler.

        A profiler that the program starts in the block ends this one and continues. Stopping this recording would then
        end the program's profiler and take its records, so it is not stopped.
        """
        if self.missing is not None:
            yield
            return
        _let_forks_end()
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
        everywhere: Any = {"experimental_config": _ExperimentalConfig(profile_all_threads=True)}
        recording: Any = profile(activities=activities, record_shapes=True, **everywhere)
        profiler: Any = torch.autograd.profiler
        enable = profiler._enable_profiler

        def record_start(*args: Any, **kwargs: Any) -> Any:
            self.missing = INSIDE
            return enable(*args, **kwargs)

        with patch.object(profiler, "_enable_profiler", record_start):
            with quiet_kineto():
                recording.start()
            self.missing = None
            try:
                yield
            finally:
                self.missing = self.missing if is_recording() else INSIDE
                if self.missing is None:
                    with quiet_kineto():
                        synchronise()
                        recording.stop()
                    self._recorded = recording.profiler.kineto_results

    def profile(self) -> StepProfile:
        """What was recorded of the step."""
        if self.missing is not None:
            return StepProfile(missing=self.missing)
        operators, written = read_events(self._recorded.experimental_event_tree())
        on_device = filter(_is_kernel, self._recorded.events()) if torch.cuda.is_initialized() else ()
        rules = [classify(event.name()) for event in on_device]
        regions = [operator for operator in operators if operator.name.startswith(COMPILED_REGION)]
        forward = [(one.call, one) for one in operators if one.call is not None and not one.in_backward]
        return StepProfile(
            attention=tuple(attention_calls(operators)),
            fourbit=tuple(fourbit_products(operators, on_cuda=bool(rules))),
            products=tuple(plain_products(operators)),
            mixing=frozenset(
                call
                for call, one in forward  # a router or a projection has a softmax over fewer dimensions
                if one.name in BATCHED_PRODUCTS or (one.name in SOFTMAX and len(one.shape(0)) >= 3)
            ),
            reductions=frozenset(call for call, one in forward if one.name in REDUCTIONS),
            writes=tuple(written),
            kernels=Counter(rule.name for rule in rules if rule is not None),
            compiled_regions=len(regions),
            compiler_lookups=sum(one.name == COMPILER_LOOKUP for one in operators),
            evaluated=tuple(sorted(one.node for one in operators if one.name.startswith(BACKWARD_ROOT))),
            entered=tuple(one.call for one in regions if not one.in_backward),
            eager=frozenset(
                call
                for call, one in forward
                if one.region is None
                and (one.name in PRODUCTS or one.name in FOURBIT or attention_backend(one.name) is not None)
            ),
        )


@cache
def _let_forks_end() -> None:
    """Let processes that are forked from now on terminate.

    The profiler leaves a thread behind, which a fork does not have, and the clean-up of the C++ libraries at the fork's
    end would wait for that thread forever, so ``_exit`` with the same status is called before it.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "on_exit"):  # glibc
        os.register_at_fork(after_in_child=lambda: library.on_exit(library._exit, None))


def is_recording() -> bool:
    """Whether a profiler is already running, which another one would end."""
    return bool(torch.autograd.profiler._is_profiler_enabled) or torch._C._autograd._profiler_enabled()


@contextmanager
def quiet_kineto() -> Iterator[None]:
    """Silence what Kineto writes to stderr, and restore its level for the program's own profiles.

    Kineto takes its level from the environment when the first profile of the process starts. It has no function that
    sets another one later, so the variable in its library is set. Without kernels_check, the level would be the
    environment's, or the one that torch sets where the environment has none.
    """
    named = os.environ.get(KINETO_LEVEL)
    level = None
    with suppress(OSError, ValueError, AttributeError):  # a build without these names
        library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        library.suppressLibkinetoLogMessages()  # torch's level; does nothing if the environment names one
        level = ctypes.c_int.in_dll(library, "_ZN9libkineto6Logger14severityLevel_E")
        before = level.value or library.atoi((named or "").encode())  # 0 until the first profile
        level.value = SILENT
    os.environ[KINETO_LEVEL] = str(SILENT)
    try:
        yield
    finally:
        os.environ.pop(KINETO_LEVEL)
        if named is not None:
            os.environ[KINETO_LEVEL] = named
        if level is not None:
            level.value = before


def read_events(roots: Iterable[Any]) -> tuple[list[Operator], list[Write]]:
    """Relevant operators in the order of their start, and the writes inside optimizer steps.

    Each operator is linked to the innermost operator around it, and to the innermost module call. An operator that is
    written in Python, or that autocast calls again with other inputs, is recorded twice, one record inside the other:
    the outer one is kept, with the inputs of the inner one.

    Args:
        roots: roots of the profiler's event tree.
    """
    operators, written = list[Operator](), list[Write]()
    # With each record: whether only user ranges are around it, and whether one of them is an optimizer's step.
    in_order = sorted(roots, key=lambda event: (event.start_tid, event.start_time_ns), reverse=True)
    waiting: list[tuple[Any, Operator | None, int | None, str]] = [(event, None, None, "range") for event in in_order]
    while waiting:
        event, parent, call, place = waiting.pop()
        name = event.name
        if name.startswith(MARK):
            call = int(name.removeprefix(MARK))
        elif is_read(name) and event.tag == _EventType.TorchOp:
            if parent is not None and parent.name == name:
                parent.event = event
            else:
                parent = Operator(name, event, parent=parent, call=call)
                operators.append(parent)
        if place == "range" and name.startswith(OPTIMIZER_ROOT):
            place = "update"
        elif place != "elsewhere" and not _is_range(name, event):
            # An operator writes its first argument if its name says so; an update of a library may write all.
            is_library, in_place = name.startswith(LIBRARY_UPDATE), name.startswith("aten::") and name.endswith("_")
            if place == "update" and (is_library or in_place):
                tensors = event.extra_fields.inputs[: None if is_library else 1]
                written.append(Write(op=name, tensors=tuple(_identities(tensors))))
                continue  # inner calls do not belong to the model
            place = "elsewhere"
        waiting += [(child, parent, call, place) for child in reversed(event.children)]
    return operators, written


def _is_range(name: str, event: Any) -> bool:
    """Whether it is a range opened by the program, instead of an operator, a backward pass or a module call."""
    if name.startswith((MARK, BACKWARD_ROOT, "aten::")):
        return False
    return getattr(getattr(event.extra_fields, "scope", None), "name", "") == "USER_SCOPE"


def _identities(inputs: Iterable[Any]) -> Iterator[Identity]:
    for value in inputs:
        if isinstance(value, list | tuple):
            yield from _identities(value)
        elif hasattr(value, "impl_ptr"):
            yield int(value.impl_ptr or 0), int(value.storage_data_ptr or 0)


def _is_kernel(event: Any) -> bool:
    """Whether it ran on the device and is neither a user annotation nor a memory record."""
    marked = event.is_user_annotation() or event.is_hidden_event() or event.name().startswith("[")
    return event.device_type() == DeviceType.CUDA and not marked
