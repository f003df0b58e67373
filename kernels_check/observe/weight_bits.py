"""How many bytes of a whole base are kept in how many bits, and what the largest exceptions are."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor, nn

from kernels_check.observe.base_state import PACKED, WEIGHTS, BaseTensor, base_state
from kernels_check.observe.module_tree import Model, ModelTree
from kernels_check.observe.storage import storage_in

_PLACE = re.compile(r"\.\d+(?=\.)")
"""The number of a layer or of an expert."""


@dataclass(slots=True)
class WeightBits:
    """The bytes of a base as they are stored here, scales included; memory that several layers share counts once."""

    bytes_of: Counter[int | None] = field(default_factory=Counter)
    """By bits of the weights they keep; None where those cannot be told."""
    weights_of: Counter[int | None] = field(default_factory=Counter)
    """The number of weights, likewise."""
    largest: Counter[tuple[int | None, str]] = field(default_factory=Counter)
    """Bytes by bits and a name in which the numbers of layers are left out, with the type."""

    def share(self, bits: int | None) -> float:
        """Share of all bytes."""
        return self.bytes_of[bits] / (self.bytes_of.total() or 1)

    def weight_share(self, bits: int | None) -> float:
        """Share of all weights."""
        return self.weights_of[bits] / (self.weights_of.total() or 1)

    def others(self, bits: int | None) -> list[tuple[str, int]]:
        """What is kept otherwise, the largest first, with its bytes."""
        return [(name, size) for (found, name), size in self.largest.most_common() if found != bits]


def take_census(model: Model) -> WeightBits:
    """Count a base: whatever it saves, by the layer that holds it."""
    census = WeightBits()
    layers: dict[int, list[BaseTensor]] = {}
    tree = ModelTree.of(model)
    for part in base_state(tree):
        if part.kind != "cache":
            layers.setdefault(id(part.layer), []).append(part)
    seen: set[object] = set()
    for parts in layers.values():
        _count(census, parts, seen, tree)
    return census


def _count(census: WeightBits, parts: list[BaseTensor], seen: set[object], tree: ModelTree) -> None:
    bits_of = _Bits(parts, tree)
    for part in parts:
        if not isinstance(part.value, Tensor):
            continue
        place = _place(part.value)
        if place in seen:
            continue
        seen.add(place)
        size, bits = _size(part.value), bits_of[part]
        census.bytes_of[bits] += size
        census.weights_of[bits] += _weights(part, bits, parts)
        kind = str(part.value.dtype).removeprefix("torch.")
        census.largest[bits, f"{_PLACE.sub('.*', part.owner)} ({kind})"] += size


class _Bits:
    """In how many bits each part of one layer is kept, found out once for each of its weights."""

    def __init__(self, parts: list[BaseTensor], tree: ModelTree) -> None:
        self._tree, self._layer = tree, parts[0].layer
        packs = any(part.kind == "beside" or _key(part) in PACKED for part in parts)
        self._packed = storage_in(tree, self._layer, _weight_name(self._layer)).bits if packs else None
        self._packs = packs

    def __getitem__(self, part: BaseTensor) -> int | None:
        key = _key(part)
        if self._packs and key != "bias":
            return self._packed
        if part.wrapper is not None or (part.kind in ("parameter", "merged") and not _plain(part.value)):
            return storage_in(self._tree, self._layer, key).bits
        return part.value.element_size() * 8 if isinstance(part.value, Tensor) else None


def _weight_name(layer: nn.Module) -> str:
    return next((name for name in WEIGHTS if name in layer._parameters), "weight")


def _key(part: BaseTensor) -> str:
    return part.owner.rpartition(".")[2]


def _plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _weights(part: BaseTensor, bits: int | None, parts: list[BaseTensor]) -> int:
    """How many weights lie in a part: none in scales, and many in a word where they are packed."""
    value = part.value
    if not isinstance(value, Tensor) or part.kind == "beside":
        return 0
    if part.wrapper is not None:
        if value is not max((one.value for one in parts if one.owner == part.owner), key=_size):
            return 0
    elif part.kind == "buffer" and _key(part) not in (*PACKED, "bias"):
        return 0
    return _size(value) * 8 // bits if bits else value.numel()


def _size(value: object) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _place(tensor: Tensor) -> object:
    return id(tensor) if tensor.is_meta else (tensor.device, tensor.data_ptr(), _size(tensor))
