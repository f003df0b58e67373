"""What an optimizer is and holds, read when it has stepped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSeen:
    """One optimizer that stepped, as it stood after its last watched step."""

    classes: tuple[str, ...]
    """Qualified names of its class and every base class, the class first."""
    learning_rates: tuple[float, ...]
    parameters: frozenset[int]
    """Identities of the parameters it updates."""
    state_bytes: int
    paged_bytes: int
    """Bytes of the state tensors that really live in paged (managed) memory."""
    claims_paged: bool
    """The optimizer's own flag, which stays true where nothing is paged."""
    fused_requested: bool | None
    on_cpu: bool


def describe(optimizer: Any) -> OptimizerSeen:
    """Read an optimizer as it stands."""
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    # Quantisation maps are shared between the states of many parameters: count each tensor once.
    tensors = {id(value): value for state in optimizer.state.values() for value in _tensors(state)}.values()
    size = {id(value): value.numel() * value.element_size() for value in tensors}
    return OptimizerSeen(
        classes=class_names(optimizer),
        learning_rates=tuple(rate_of(group) for group in optimizer.param_groups),
        parameters=frozenset(map(id, parameters)),
        state_bytes=sum(size.values()),
        paged_bytes=sum(size[id(value)] for value in tensors if getattr(value, "is_paged", False) is True),
        claims_paged=bool(getattr(optimizer, "is_paged", False)),
        fused_requested=optimizer.defaults.get("fused"),
        on_cpu=all(value.device.type == "cpu" for value in parameters),
    )


def class_names(optimizer: Any) -> tuple[str, ...]:
    """Qualified names of its class and every base class, the class first."""
    return tuple(f"{kind.__module__}.{kind.__qualname__}" for kind in type(optimizer).__mro__)


def rate_of(group: Any) -> float:
    """Learning rate of one group; an optimizer that finds it by itself says none, which counts as one."""
    try:
        return abs(float(group.get("lr", 1.0)))
    except (TypeError, ValueError, RuntimeError):
        return 1.0


def _tensors(state: Any) -> list[Tensor]:
    values = state.values() if isinstance(state, dict) else ()
    return [value for value in values if isinstance(value, Tensor)]
