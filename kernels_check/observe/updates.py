"""Which parameters an optimizer updated in the watched call, and by what kind of operator.

A fused operator somewhere in the step proves nothing of the groups that it was not given. So each operator that writes
inside an optimizer's step is kept with the tensors that it wrote, and each parameter that had a gradient is asked which
of them wrote it. What clips gradients or counts steps writes no parameter. A closure's forward and backward run inside
the step, too; they write none either, but for the backward pass, which is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kernels_check.observe.operators import BACKWARD_ROOT, DISPATCH_MODE, OPTIMIZER_ROOT

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
    with suppress(RuntimeError, NotImplementedError):  # a tensor of another kind may have no storage
        storage = tensor.untyped_storage().data_ptr()
    return int(tensor._cdata), storage


def write(name: str, arguments: Sequence[Any]) -> Write:
    """The write of an operator that ``writes``, from its arguments."""
    given = arguments if name.startswith(LIBRARY_UPDATE) else arguments[:1]
    return Write(op=name, tensors=tuple(identity(one) for one in _tensors(given)))


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


def is_hidden_by_a_mode(roots: Iterable[Any], mark: str) -> bool:
    """Whether a profile shows nothing inside an optimizer's step, since a dispatch mode was active around it.

    The operator that opens the step's range is given to the mode as any other, and the record of that ends the range.

    Args:
        roots: as for ``recorded_writes``.
        mark: likewise.
    """
    for event in roots:
        given = event.name == DISPATCH_MODE
        if given and any(one.name.startswith(OPTIMIZER_ROOT) for one in event.children):
            return True
        if (given or _is_range(event, mark)) and is_hidden_by_a_mode(event.children, mark):
            return True
    return False


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


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for one in arguments:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, list | tuple):
            yield from _tensors(one)
