"""What is written down of a drawn model while it is being drawn: what is true of it, and how its layers are stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""What may be required of a path whose requirement is the least share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What is true of one path."""

    holds: frozenset[Any] = frozenset()
    """Requirements that are met; any other is not."""
    free: frozenset[Any] = frozenset()
    """Requirements of which the words of the path do not say whether they are met."""
    hidden: bool = False
    """Whether nobody could see it, so that unknown is right, too."""


def true(*holds: Any, free: Any = (), hidden: bool = False) -> Truth:
    """Truth of a path for which these requirements hold."""
    return Truth(holds=frozenset(holds), free=frozenset(free), hidden=hidden)


def at_least(share: float, most: float | None = None) -> Truth:
    """Truth of a path that requires a share of at least so much; between the two, the words do not say."""
    most = share if most is None else most
    return true(*(one for one in SHARES if one <= share), free=[one for one in SHARES if share < one <= most])


def freer(truth: Truth) -> Truth:
    """What held may hold, and need not."""
    return true(free=truth.holds | truth.free, hidden=truth.hidden)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """How the weight of one layer is stored, and what its products are computed in; None: not said."""

    bits: int
    quant: str = "none"
    double: bool | None = None
    compute: str | None


@dataclass(kw_only=True)
class Drawn:
    """A model and what is known of it; mutable while it is being built."""

    model: Any
    """What is verified."""
    adapted: Any
    """What PEFT returned: the model, or what is inside of it."""
    layers: list[Any]
    """Decoder layers, in their order."""
    truths: dict[str, Truth] = field(default_factory=dict)
    about: list[str] = field(default_factory=list)
    style: str = "plain"
    held: bool = False
    stored: dict[str, Stored] = field(default_factory=dict)
    targets: dict[str, Any] = field(default_factory=dict)
    """Adapted layers by name."""

    @property
    def eight(self) -> bool:
        """Whether any layer is stored in 8 bits."""
        return any(stored.bits == 8 for stored in self.stored.values())

    @property
    def small(self) -> bool:
        """Whether any layer is stored in fewer than 16 bits."""
        return any(stored.bits < 16 for stored in self.stored.values())
