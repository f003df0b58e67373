"""Whether a base has changed: fingerprints of everything it holds, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kernels_check.observe.base_state import Kind, base_state, base_weight, is_packed, quant_state
from kernels_check.observe.fingerprint import Fingerprinter, has_memory
from kernels_check.observe.fourbit import layout_problem
from kernels_check.observe.module_tree import Model, ModelTree

ROUNDINGS = 4
"""Units in the last place of the largest weight that a few merges and their undoing leave at most; one in the mean."""
_SHARDED = "DTensor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hashed:
    """One part of a base, with its fingerprint."""

    fingerprint: str
    kind: Kind = "parameter"
    owner: str = ""
    """Name of the tensor that it is a part of."""
    tensor: Tensor | None = field(default=None, compare=False, repr=False)
    """The memory as it was then: who casts a tensor puts other memory in its place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DigestDifference:
    """What of a base differs between two digests, by name."""

    changed: tuple[str, ...] = ()
    """Parts that training on this base later depends on."""
    cast: tuple[str, ...] = ()
    """The same values in another type."""
    rounded: tuple[str, ...] = ()
    """Weights that PEFT merged the adapter into and out of again, as far as rounding explains the difference."""
    caches: tuple[str, ...] = ()
    """Buffers that are not saved with the model."""
    incomparable: tuple[str, ...] = ()
    """Parts of tensors that were sharded in one and whole in the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """Fingerprints of a base, every byte of it."""

    parts: Mapping[str, Hashed]
    total_bytes: int
    """Of all memory that was read; what several layers share counts once."""
    unseen: Mapping[str, str]
    """Parts whose bytes could not be read, with the reason."""
    sharded: frozenset[str]
    """Tensors of which this process holds a shard."""
    packed: bool
    """Whether a 4-bit weight was in the layout that bitsandbytes makes for a CPU."""
    torn: Mapping[str, str] = field(default_factory=dict)
    """4-bit layers whose weight lies otherwise than its state says, with the reason."""

    def is_buffer(self, name: str) -> bool:
        """Whether a part is one of a buffer."""
        return name in self.parts and self.parts[name].kind == "buffer"

    def since(self, before: Digest) -> DigestDifference:
        """What has changed since an earlier digest of the same model."""
        resharded = before.sharded ^ self.sharded
        found: dict[str, list[str]] = {}
        for name in sorted(before.parts.keys() | self.parts.keys()):
            old, new = before.parts.get(name), self.parts.get(name)
            one = new or old
            if one is None or (old is not None and new is not None and old.fingerprint == new.fingerprint):
                continue
            if one.owner in resharded:
                kind = "incomparable"
            elif one.kind == "cache":
                kind = "caches"
            else:
                kind = _difference(old, new)
            found.setdefault(kind, []).append(name)
        return DigestDifference(**{kind: tuple(names) for kind, names in found.items()})


def digest(model: Model, before: Digest | None = None) -> Digest:
    """Fingerprint the base of a model: each part that ``base_state`` names.

    Args:
        model: the model.
        before: an earlier digest of it; what has moved since to another kind of device is read where it lay then.
    """
    tree, take = ModelTree.of(model), Fingerprinter()
    earlier: Mapping[str, Hashed] = before.parts if before is not None else {}
    parts: dict[str, Hashed] = {}
    unseen: dict[str, str] = {}
    sharded = set()
    for part in base_state(tree):
        if part.wrapper == _SHARDED:
            sharded.add(part.owner)
        if isinstance(part.value, str):
            parts[part.name] = Hashed(fingerprint=part.value, kind=part.kind, owner=part.owner)
            continue
        try:
            tensor = _readable(part.value)
            taken = take(_where_it_lay(tensor, earlier.get(part.name)))
            parts[part.name] = Hashed(fingerprint=taken, kind=part.kind, owner=part.owner, tensor=tensor)
        except Exception as error:  # of a kind that nobody has met: unknown, and nothing else is lost
            if part.kind != "cache":
                unseen[part.name] = str(error) or type(error).__name__
    states = _states(tree)
    return Digest(
        parts=parts,
        total_bytes=take.bytes,
        unseen=unseen,
        sharded=frozenset(sharded),
        packed=any(is_packed(state) for _, _, _, state in states),
        torn={name: why for name, *kept in states if (why := layout_problem(*kept)) is not None},
    )


def _states(tree: ModelTree) -> list[tuple[str, nn.Module, Any, Any]]:
    """Name, layer, weight and state of every 4-bit weight."""
    found = ((name, layer, base_weight(layer)) for name, layer in tree.modules)
    with_weight = (one for one in found if one[2] is not None)
    with_state = ((name, layer, weight, quant_state(layer, weight)) for name, layer, weight in with_weight)
    return [one for one in with_state if one[3] is not None]


def _readable(value: Tensor | Exception) -> Tensor:
    if isinstance(value, Exception):
        raise value
    if value.is_meta:
        raise ValueError("it lies on the meta device")
    return value.detach()


def _where_it_lay(tensor: Tensor, before: Hashed | None) -> Tensor:
    """The tensor on the kind of device on which it was read before."""
    then = before.tensor if before is not None else None
    return tensor if then is None or then.device.type == tensor.device.type else tensor.to(then.device)


def _difference(old: Hashed | None, new: Hashed | None) -> str:
    """Tell what training does to a part from what a forward does to it: a cast, and rounding where PEFT merges."""
    if old is None or new is None or old.tensor is None or new.tensor is None:
        return "changed"
    take = Fingerprinter()
    one, other = old.tensor, new.tensor
    if not has_memory(one) or one.data_ptr() == other.data_ptr() or take(one) != old.fingerprint:
        return "changed"  # written to, whatever else
    if one.dtype != other.dtype:
        return "cast" if take(one.to(other.dtype)) == new.fingerprint else "changed"
    return "rounded" if old.kind == "merged" and _is_rounded(one, other) else "changed"


def _is_rounded(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are as near as some sums and differences of them leave."""
    if one.shape != other.shape or not one.is_floating_point() or not one.numel():
        return False
    exact, eps = one.double(), torch.finfo(one.dtype).eps
    apart = (exact - other.double()).abs()
    sizes = exact.abs()
    return bool(apart.max() <= ROUNDINGS * eps * sizes.max()) and bool(apart.mean() <= eps * sizes.mean())
