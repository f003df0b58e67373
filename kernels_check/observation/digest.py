"""Whether a base has changed: fingerprints of everything it holds, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from kernels_check.observation.base_state import Kind, base_state, base_weight, is_packed, quant_state
from kernels_check.observation.fingerprint import Fingerprinter

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
class Change:
    """What of a base differs between two digests, by name."""

    changed: tuple[str, ...] = ()
    """Parts that training on this base later depends on."""
    cast: tuple[str, ...] = ()
    """The same values in another type."""
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

    def since(self, before: Digest) -> Change:
        """What has changed since an earlier digest of the same model."""
        resharded = before.sharded ^ self.sharded
        changed, cast, caches, incomparable = [], [], [], []
        for name in sorted(before.parts.keys() | self.parts.keys()):
            old, new = before.parts.get(name), self.parts.get(name)
            one = new or old
            if one is None or (old is not None and new is not None and old.fingerprint == new.fingerprint):
                continue
            if one.owner in resharded:
                incomparable.append(name)
            elif one.kind == "cache":
                caches.append(name)
            elif _is_cast(old, new):
                cast.append(name)
            else:
                changed.append(name)
        return Change(changed=tuple(changed), cast=tuple(cast), caches=tuple(caches), incomparable=tuple(incomparable))


def digest(model: nn.Module) -> Digest:
    """Fingerprint the base of a model: each part that ``base_state`` names."""
    take = Fingerprinter()
    parts: dict[str, Hashed] = {}
    unseen: dict[str, str] = {}
    sharded = set()
    for part in base_state(model):
        if part.wrapper == _SHARDED:
            sharded.add(part.owner)
        if isinstance(part.value, str):
            parts[part.name] = Hashed(fingerprint=part.value, kind=part.kind, owner=part.owner)
            continue
        try:
            tensor = _readable(part.value)
            parts[part.name] = Hashed(fingerprint=take(tensor), kind=part.kind, owner=part.owner, tensor=tensor)
        except Exception as error:  # of a kind that nobody has met: unknown, and nothing else is lost
            unseen[part.name] = str(error) or type(error).__name__
    return Digest(
        parts=parts,
        total_bytes=take.bytes,
        unseen=unseen,
        sharded=frozenset(sharded),
        packed=any(is_packed(quant_state(layer, base_weight(layer))) for layer in model.modules()),
    )


def _readable(value: Tensor | Exception) -> Tensor:
    if isinstance(value, Exception):
        raise value
    if value.is_meta:
        raise ValueError("it lies on the meta device")
    return value.detach()


def _is_cast(old: Hashed | None, new: Hashed | None) -> bool:
    """Whether the later holds the values of the earlier, rounded to a type of its own."""
    if old is None or new is None or old.tensor is None or new.tensor is None or old.tensor.dtype == new.tensor.dtype:
        return False
    take = Fingerprinter()
    return take(old.tensor) == old.fingerprint and take(old.tensor.to(new.tensor.dtype)) == new.fingerprint
