"""The value of one parameter, kept to be compared with what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels_check.observe.gradients import largest
from kernels_check.observe.tensor_copy import plain_parts

STUCK_SHARE = 0.9
"""Share of the elements with a gradient that an update must leave as they are to count as lost to rounding."""
_NARROW = (torch.bfloat16, torch.float16)


@dataclass(slots=True)
class KeptValue:
    """The last known value of one parameter, and what the last update did to it.

    Of a sharded parameter it is the part that is here.
    """

    tensor: Tensor
    _parts: list[Tensor] = field(default_factory=list)
    _before: list[Tensor] = field(default_factory=list)
    """The value from which the last update started; none once something else wrote to it."""
    _version: int = 0

    def __post_init__(self) -> None:
        self._parts = [part.clone() for part in _parts(self.tensor)]
        self._version = _version(self.tensor)

    @property
    def is_narrow(self) -> bool:
        """Whether its dtype may swallow an update."""
        return self.tensor.dtype in _NARROW

    def is_last(self) -> bool:
        """Whether it is what it was when it was last looked at."""
        return self._is_kept(_parts(self.tensor))

    def settle(self) -> bool:
        """Take in what an update wrote; say whether it wrote anything new."""
        parts = _parts(self.tensor)
        if self._is_kept(parts):
            return False
        self._keep(parts, self._parts)
        return True

    def written(self) -> tuple[bool, bool]:
        """Take in what something other than an update wrote; whether anything did, and whether it undid the update.

        What projects the weights after an update (a clamp, a norm) moves few of them, or all of them by less.
        """
        parts = _parts(self.tensor)
        if self._is_kept(parts):
            touched = _version(self.tensor) != self._version
            self._version = _version(self.tensor)
            return touched, False
        undone = bool(self._before) and self._undoes(parts)
        self._keep(parts, [])
        return True, undone

    def is_faint(self, rate: float) -> bool:
        """Whether an update in proportion to the gradient is too small for float32 to show."""
        gradient = self.tensor.grad
        size = None if gradient is None or self.is_narrow else largest(gradient)
        if size is None:
            return False
        greatest = max((float(part.abs().max()) for part in self._parts if part.numel()), default=0.0)
        return rate * float(size) < torch.finfo(self.tensor.dtype).eps * greatest

    def is_stuck(self) -> bool:
        """Whether the last update left nearly all that had a gradient as it was, as a narrow dtype may."""
        gradient = self.tensor.grad
        if not self.is_narrow or gradient is None or gradient.layout != torch.strided:
            return False
        pairs = [(one != 0, moved) for one, moved in zip(_parts(gradient), self._moved(), strict=True)]
        given = sum(int(has.sum()) for has, _ in pairs)
        return sum(int((has & ~moved).sum()) for has, moved in pairs) > STUCK_SHARE * given

    def _is_kept(self, parts: list[Tensor]) -> bool:
        """Whether a value is the last known one."""
        return all(torch.equal(now, then) for now, then in zip(parts, self._parts, strict=True))

    def _keep(self, parts: list[Tensor], before: list[Tensor]) -> None:
        self._parts = [part.clone() for part in parts]
        self._version, self._before = _version(self.tensor), before

    def _moved(self) -> list[Tensor]:
        """Which elements the last update moved."""
        return [now != then for now, then in zip(self._parts, self._before, strict=True)]

    def _undoes(self, parts: list[Tensor]) -> bool:
        """Whether a value is as far from the last known one as the update had moved that, and in other places."""
        if not _distance(self._parts, self._before) <= _distance(parts, self._parts) * (1 + 1e-6):
            return False
        moved = self._moved()
        left = zip(parts, self._parts, moved, strict=True)
        return (
            sum(int(((now == then) & one).sum()) for now, then, one in left) < sum(int(one.sum()) for one in moved) / 2
        )


def _distance(one: list[Tensor], other: list[Tensor]) -> float:
    """How far two values are apart; parts that are the same may be infinite."""
    pairs = [(now, then) for now, then in zip(one, other, strict=True) if not torch.equal(now, then)]
    total: float = sum(float((now.double() - then.double()).square().sum()) for now, then in pairs) ** 0.5
    return total


def _parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that one is made of, as far as they are here."""
    return [part for _, part in plain_parts(tensor.detach())]


def _version(tensor: Tensor) -> int:
    """Changes in place that autograd counts; a write through ``data`` is none."""
    try:
        return tensor._version
    except RuntimeError:  # an inference tensor counts none
        return 0
