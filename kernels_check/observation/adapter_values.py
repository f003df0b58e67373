"""The value of one parameter, kept to be compared with what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels_check.observation.gradients import largest
from kernels_check.observation.tensor_copy import plain_parts

STUCK_SHARE = 0.9
"""Share of the elements with a gradient that an update must leave as they are to count as lost to rounding."""
_NARROW = (torch.bfloat16, torch.float16)


@dataclass(slots=True)
class KeptValue:
    """The last known value of one parameter, and what the last update did to it.

    Of a sharded parameter it is the part that is here.
    """

    tensor: Tensor
    distance: float = 0.0
    """How far the last update moved it; zero once something else wrote to it."""
    _parts: list[Tensor] = field(default_factory=list)
    _moved: list[Tensor] = field(default_factory=list)
    """Which elements the last update moved."""
    _version: int = 0

    def __post_init__(self) -> None:
        self._parts = [part.clone() for part in _parts(self.tensor)]
        self._version = _version(self.tensor)

    def settle(self) -> bool:
        """Take in what an update wrote; say whether it wrote anything new."""
        parts = _parts(self.tensor)
        distance = self._distance(parts)
        if distance is None:
            return False
        self._moved = [now != then for now, then in zip(parts, self._parts, strict=True)]
        self._keep(parts, distance)
        return True

    def written(self) -> tuple[bool, bool]:
        """Take in what something other than an update wrote; whether anything did, and whether it undid the update.

        What projects the weights after an update (a clamp, a norm) moves few of them, or all of them by less.
        """
        parts = _parts(self.tensor)
        distance = self._distance(parts)
        if distance is None:
            touched = _version(self.tensor) != self._version
            self._version = _version(self.tensor)
            return touched, False
        undone = False
        if 0 < self.distance <= distance * (1 + 1e-6):
            moved = sum(int(changed.sum()) for changed in self._moved)
            triples = zip(parts, self._parts, self._moved, strict=True)
            undone = sum(int(((now == then) & changed).sum()) for now, then, changed in triples) < moved / 2
        self._keep(parts, 0.0)
        return True, undone

    @torch.no_grad()
    def is_faint(self, rate: float) -> bool:
        """Whether an update in proportion to the gradient is too small for float32 to show."""
        gradient = self.tensor.grad
        size = None if gradient is None or self.tensor.dtype in _NARROW else largest(gradient)
        if size is None:
            return False
        greatest = max((float(part.abs().max()) for part in self._parts if part.numel()), default=0.0)
        return rate * float(size) < torch.finfo(self.tensor.dtype).eps * greatest

    @torch.no_grad()
    def is_stuck(self) -> bool:
        """Whether the last update left nearly all that had a gradient as it was, as a narrow dtype may."""
        gradient = self.tensor.grad
        if self.tensor.dtype not in _NARROW or gradient is None or gradient.layout != torch.strided:
            return False
        pairs = [(one != 0, moved) for one, moved in zip(_parts(gradient), self._moved, strict=True)]
        given = sum(int(has.sum()) for has, _ in pairs)
        return sum(int((has & ~moved).sum()) for has, moved in pairs) > STUCK_SHARE * given

    @torch.no_grad()
    def _distance(self, parts: list[Tensor]) -> float | None:
        """How far a value is from the last known one; None where they are the same."""
        pairs = [(now, then) for now, then in zip(parts, self._parts, strict=True) if not torch.equal(now, then)]
        if not pairs:
            return None
        total: float = sum(float((now.double() - then.double()).square().sum()) for now, then in pairs) ** 0.5
        return total

    @torch.no_grad()
    def _keep(self, parts: list[Tensor], distance: float) -> None:
        for kept, part in zip(self._parts, parts, strict=True):
            kept.copy_(part)
        self._version, self.distance = _version(self.tensor), distance


def _parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that one is made of, as far as they are here."""
    return [part for _, part in plain_parts(tensor.detach())]


def _version(tensor: Tensor) -> int:
    """Changes in place that autograd counts; a write through ``data`` is none."""
    try:
        return tensor._version
    except RuntimeError:  # an inference tensor counts none
        return 0
