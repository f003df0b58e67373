"""Records a step by torch's profiler and reduces it to what the judges need.

``profile.events()`` makes an object of some forty attributes of every record and links them all, which takes longer
than the steps of a small model. Fewer than a tenth of the raw records matter, so names come first.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from kernels_check.observe.calls import MARK, number_of
from kernels_check.observe.hooks import patched, synchronise
from kernels_check.observe.operators import (
    COMPILED_REGION,
    COMPILER_LOOKUP,
    FOURBIT,
    MASKING,
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
from kernels_check.observe.optimizer import Write, is_hidden_by_a_mode, recorded_writes
from kernels_check.rules import attention_backend, classify


@dataclass(frozen=True, slots=True, kw_only=True)
class CompilerSeen:
    """What one step shows of torch.compile."""

    entered: tuple[int | None, ...] = ()
    """For each compiled region of the forward pass the module call that it was entered in; None outside the model."""
    regions: int = 0
    """All of them, those of the backward pass included."""
    lookups: int = 0
    """Dynamo cache look-ups; without a compiled region they mean that the code ran eagerly after all."""
    eager: frozenset[int] = frozenset()
    """Numbers of the module calls in which products or attention of the forward pass ran outside of any region."""


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
    writes_hidden: bool = False
    """Whether a dispatch mode of the program hid what optimizers wrote."""
    kernels: Mapping[str, int]
    """Launches of each kernel rule (see ``rules``); empty without CUDA."""
    unclassified: Mapping[str, int]
    """Launches of each kernel that no rule knows."""
    compiler: CompilerSeen = field(default_factory=CompilerSeen)
    missing: str | None = None
    """Why nothing was recorded, so that whatever rests on operators is unknown."""

    @property
    def compiled_regions(self) -> int:
        """Compiled regions that were entered in either pass."""
        return self.compiler.regions

    @property
    def compiler_lookups(self) -> int:
        """Look-ups in the compiler's cache."""
        return self.compiler.lookups


def reduce_operators(
    operators: list[Operator],
    *,
    kernels: Iterable[str] = (),
    writes: Iterable[Write] = (),
    writes_hidden: bool = False,
) -> StepProfile:
    """Reduce what one step called on the host, and the names of the kernels that it launched.

    Args:
        operators: those that ``matters`` keeps, each linked to its nearest kept caller.
        kernels: names as the profiler spells them.
        writes: inside the steps of optimizers.
        writes_hidden: see ``StepProfile``.
    """
    known, unclassified = Counter[str](), Counter[str]()
    for name in kernels:
        rule = classify(name)
        if rule is None:
            unclassified[name] += 1
        else:
            known[rule.name] += 1
    return StepProfile(
        attention=tuple(attention_calls(operators)),
        fourbit=tuple(fourbit_products(operators, on_cuda=bool(known or unclassified))),
        products=tuple(plain_products(operators)),
        mixing=frozenset(operator.call for operator in operators if operator.call is not None and _mixes(operator)),
        reductions=frozenset(
            operator.call
            for operator in operators
            if operator.call is not None and operator.name in REDUCTIONS and not in_backward(operator)
        ),
        writes=tuple(writes),
        writes_hidden=writes_hidden,
        kernels=known,
        unclassified=unclassified,
        compiler=compiler_seen(operators),
    )


def not_recorded(reason: str) -> StepProfile:
    """A profile without anything in it."""
    return replace(reduce_operators([]), missing=reason)


def compiler_seen(operators: Sequence[Operator]) -> CompilerSeen:
    """What the operators of a step show of torch.compile; names are all that is read."""
    regions = [operator for operator in operators if operator.name.startswith(COMPILED_REGION)]
    return CompilerSeen(
        entered=tuple(operator.call for operator in regions if not in_backward(operator)),
        regions=len(regions),
        lookups=sum(operator.name == COMPILER_LOOKUP for operator in operators),
        eager=frozenset(
            operator.call
            for operator in operators
            if operator.call is not None
            and _computes(operator)
            and region_of(operator) is None
            and not in_backward(operator)
        ),
    )


def _computes(event: Operator) -> bool:
    return event.name in PRODUCTS or event.name in FOURBIT or attention_backend(event.name) is not None


def _mixes(event: Operator) -> bool:
    """Whether it may mix tokens: what a router or a projection does is over fewer dimensions."""
    batched = event.name in ("aten::bmm", "aten::baddbmm")
    return (batched or (event.name in SOFTMAX and len(event.shape(0)) >= 3)) and not in_backward(event)


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
        with patched(torch.autograd.profiler, "_enable_profiler", self._noticing):
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
        return reduce_operators(
            operators,
            kernels=kernels,
            writes=recorded_writes(roots, MARK),
            writes_hidden=is_hidden_by_a_mode(roots, MARK),
        )

    def _events(self) -> list[Any]:
        result: Any = getattr(self._profile.profiler, "kineto_results", None)
        if not self._read and result is not None:
            self._read = result.events()
        return self._read

    def _noticing(self, enable: Callable[..., Any]) -> Callable[..., Any]:
        def noticed(*args: Any, **kwargs: Any) -> Any:
            self._another = True
            return enable(*args, **kwargs)

        return noticed


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
