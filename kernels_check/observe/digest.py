"""Detects changes of a base by fingerprints of all its tensors, and counts its bytes by number of bits.

The fingerprint of a tensor is computed on its device, and is the same on all devices: its 64-bit words are mixed,
multiplied by odd random numbers that depend on the position in a row, and summed by row; the sums are hashed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from hashlib import blake2b

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels_check.observe.base import (
    PACKED,
    WEIGHTS,
    BaseTensor,
    Kind,
    base_state,
    base_weight,
    is_packed,
    layout_problem,
    quant_state,
    storage_in,
)
from kernels_check.observe.modules import NO_MEMORY, ModelTree, has_memory

_WORDS = 1024
"""Words in a row."""
_ROW_BYTES = _WORDS * 8
_ROWS = 1024
"""Rows in a block, which is small enough for CPU caches."""
_SHIFT = 29
"""Moves the highest bits down, pairs of which would cancel in a sum of products. It is not a distance between lanes of
a word, such as 8, 16 or 32, at which an operation such as a negation changes all elements alike."""
_SEED = 20_240_229


class Fingerprinter:
    """Computes fingerprints, for each tensor only once, however many names it has."""

    def __init__(self) -> None:
        self._weights: dict[torch.device, Tensor] = {}
        self._taken: dict[object, tuple[Tensor, str]] = {}
        self.bytes = 0
        """Total bytes of memory read."""

    def __call__(self, tensor: Tensor) -> str:
        """Fingerprint dtype, shape and bytes of a dense tensor, in the order of its elements.

        Raises:
            Exception: the tensor cannot be read.
        """
        if not has_memory(tensor):
            raise ValueError(NO_MEMORY)
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place not in self._taken:
            self._taken[place] = (tensor, self._take(tensor))  # kept alive, so that its memory is not reused
            self.bytes += tensor.nbytes
        return self._taken[place][1]

    def _take(self, tensor: Tensor) -> str:
        raw = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        rest = raw.numel() % _ROW_BYTES
        parts = (raw[: raw.numel() - rest], pad(raw[raw.numel() - rest :], (0, -rest % _ROW_BYTES)))
        rows = [rows for part in parts if part.numel() for rows in part.view(-1, _ROW_BYTES).split(_ROWS)]
        sums = torch.cat([self._sum(block) for block in rows]).tolist() if rows else []
        return blake2b(f"{tensor.dtype} {tuple(tensor.shape)} {sums}".encode()).hexdigest()

    def _sum(self, rows: Tensor) -> Tensor:
        """For each row, the sum of its mixed words, each times the odd random number of its position."""
        words = (rows if rows.storage_offset() % 8 == 0 else rows.clone()).view(torch.int64)
        mixed = words >> _SHIFT
        mixed &= (1 << 64 - _SHIFT) - 1
        mixed ^= words
        mixed *= self._weights_on(rows.device)
        return mixed.sum(-1)

    def _weights_on(self, device: torch.device) -> Tensor:
        if device not in self._weights:
            generator = torch.Generator().manual_seed(_SEED)
            self._weights[device] = (torch.randint(-(2**63), 2**63 - 1, (_WORDS,), generator=generator) | 1).to(device)
        return self._weights[device]


ROUNDINGS = 4
"""Maximum difference that a few merges and unmerges leave, in units in the last place of the largest weight; one unit
in the mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HashedPart:
    """One part of a base, with its fingerprint."""

    fingerprint: str
    kind: Kind = "parameter"
    owner: str = ""
    """Name of the tensor of which it is a part."""
    tensor: Tensor | None = field(default=None, compare=False, repr=False)
    """The tensor itself: a cast replaces it by another, and an in-place write changes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DigestDifference:
    """Names of the parts of a base that differ between two digests."""

    changed: tuple[str, ...] = ()
    """Parts whose change affects later training on this base."""
    cast: tuple[str, ...] = ()
    """Parts with the same values in another dtype."""
    rounded: tuple[str, ...] = ()
    """Weights that PEFT merged and unmerged, if rounding explains the difference."""
    caches: tuple[str, ...] = ()
    """Buffers that are not saved with the model."""
    incomparable: tuple[str, ...] = ()
    """Parts of tensors that were sharded in one digest and unsharded in the other."""

    def __or__(self, other: DigestDifference) -> DigestDifference:
        """The parts that differ at either of two times."""
        pairs = ((one.name, (*getattr(self, one.name), *getattr(other, one.name))) for one in fields(self))
        return DigestDifference(**{name: tuple(dict.fromkeys(parts)) for name, parts in pairs})


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """Fingerprints of every byte of a base."""

    parts: Mapping[str, HashedPart]
    total_bytes: int
    """Bytes of all memory read; memory shared by several layers counts once."""
    unseen: Mapping[str, str]
    """Parts whose bytes could not be read, with the reason."""
    sharded: frozenset[str]
    """Names of sharded tensors, of which this process holds a part."""
    packed: bool
    """Whether a 4-bit weight was in bitsandbytes' CPU layout."""
    mismatched: Mapping[str, str] = field(default_factory=dict)
    """4-bit layers whose weight layout differs from that of the quantisation state, with the reason."""

    def since(self, before: Digest) -> DigestDifference:
        """The difference from an earlier digest of the same model."""
        resharded = before.sharded ^ self.sharded
        found: dict[str, tuple[str, ...]] = {}
        for name in self.changed_parts(before):
            old, new = before.parts.get(name), self.parts.get(name)
            one = new or before.parts[name]
            if one.owner in resharded:
                kind = "incomparable"
            else:
                kind = "caches" if one.kind == "cache" else _difference(old, new)
            found[kind] = (*found.get(kind, ()), name)
        return DigestDifference(**found)

    def changed_parts(self, before: Digest) -> list[str]:
        """Names of the parts whose fingerprint differs from that in an earlier digest, or which only one has."""
        names = sorted(before.parts.keys() | self.parts.keys())
        digests = (before.parts, self.parts)
        return [name for name in names if len({getattr(one.get(name), "fingerprint", None) for one in digests}) > 1]


def hash_base(tree: ModelTree) -> Digest:
    """Fingerprint the base of a model: each part that ``base_state`` names."""
    take = Fingerprinter()
    parts: dict[str, HashedPart] = {}
    unseen: dict[str, str] = {}
    sharded = set()
    for part in base_state(tree):
        if part.wrapper == "DTensor":
            sharded.add(part.owner)
        try:
            if isinstance(part.value, Exception):
                raise part.value
            tensor = part.value.detach() if isinstance(part.value, Tensor) else None
            if tensor is not None and tensor.is_meta:
                raise ValueError("it lies on the meta device")
            fingerprint = str(part.value) if tensor is None else take(tensor)
            parts[part.name] = HashedPart(fingerprint=fingerprint, kind=part.kind, owner=part.owner, tensor=tensor)
        except Exception as error:  # an unexpected error makes only this part unseen
            if part.kind != "cache":
                unseen[part.name] = str(error) or type(error).__name__
    weights = ((name, layer, base_weight(layer)) for name, layer in tree.modules)
    states = [
        (name, layer, weight, quant_state(layer, weight)) for name, layer, weight in weights if weight is not None
    ]
    quantised = [one for one in states if one[3] is not None]
    return Digest(
        parts=parts,
        total_bytes=take.bytes,
        unseen=unseen,
        sharded=frozenset(sharded),
        packed=any(is_packed(state) for _, _, _, state in quantised),
        mismatched={name: why for name, *kept in quantised if (why := layout_problem(*kept)) is not None},
    )


def _difference(old: HashedPart | None, new: HashedPart | None) -> str:
    """Distinguish training from changes in a forward pass: a cast, and rounding by PEFT's merging."""
    if old is None or new is None or old.tensor is None or new.tensor is None:
        return "changed"
    take = Fingerprinter()
    one, other = old.tensor, new.tensor
    if not has_memory(one) or one.data_ptr() == other.data_ptr() or take(one) != old.fingerprint:
        return "changed"  # written to
    if one.dtype != other.dtype:
        return "cast" if take(one.to(other.dtype)) == new.fingerprint else "changed"
    return "rounded" if old.kind == "merged" and _is_rounded(one, other) else "changed"


def _is_rounded(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ by at most the rounding of a few sums and differences."""
    if one.shape != other.shape or not one.is_floating_point() or not one.numel():
        return False
    eps, sizes = torch.finfo(one.dtype).eps, one.double().abs()
    difference = (one.double() - other.double()).abs()
    return bool(difference.max() <= ROUNDINGS * eps * sizes.max()) and bool(difference.mean() <= eps * sizes.mean())


_PLACE = re.compile(r"\.\d+(?=\.)")
"""The number of a layer or an expert."""


@dataclass(slots=True)
class WeightBits:
    """The bytes of a base as stored here, including scales; memory shared by several layers counts once."""

    bytes_of: Counter[int | None] = field(default_factory=Counter)
    """Bytes by the number of bits of the weights; None if unknown."""
    bytes_by_part: Counter[tuple[int | None, str]] = field(default_factory=Counter)
    """Bytes by bits and by a name without layer numbers, with the dtype."""

    def share(self, bits: int | None) -> float:
        """Share of all bytes."""
        return self.bytes_of[bits] / (self.bytes_of.total() or 1)

    def others(self, bits: int | None) -> list[tuple[str, int]]:
        """Parts with another number of bits, the largest first, with their bytes."""
        return [(name, size) for (found, name), size in self.bytes_by_part.most_common() if found != bits]


def count_bytes(tree: ModelTree) -> WeightBits:
    """Count the bytes of everything that the base saves, by layer."""
    census, seen = WeightBits(), set[object]()
    parts = [part for part in base_state(tree) if part.kind != "cache"]
    packing = {id(part.layer) for part in parts if part.kind == "quantisation" or _key(part) in PACKED}
    for part, value in ((part, part.value) for part in parts if isinstance(part.value, Tensor)):
        place = id(value) if value.is_meta else (value.device, value.data_ptr(), value.nbytes)
        if place not in seen:
            seen.add(place)
            bits = _count_bits(part, value, tree, packed=id(part.layer) in packing)
            census.bytes_of[bits] += value.nbytes
            kind = str(value.dtype).removeprefix("torch.")
            census.bytes_by_part[bits, f"{_PLACE.sub('.*', part.owner)} ({kind})"] += value.nbytes
    return census


def _count_bits(part: BaseTensor, value: Tensor, tree: ModelTree, *, packed: bool) -> int | None:
    """The number of bits of a part; scales count as the weight of a layer that packs it."""
    key = _key(part)
    weight = next((name for name in WEIGHTS if name in part.layer._parameters), "weight")
    if packed and key != "bias" and (bits := storage_in(tree, part.layer, weight).bits):
        return bits
    if part.wrapper is not None or (part.kind in ("parameter", "merged") and not value.is_floating_point()):
        return storage_in(tree, part.layer, key).bits
    return value.element_size() * 8


def _key(part: BaseTensor) -> str:
    return part.owner.rpartition(".")[2]
