"""Which modules a step goes through, and for which it computes the gradient of what they take: seen in its passes.

Autograd makes that gradient where what comes in wants one, which no module tells and every call does: of the first
block the layers that take the embeddings want none. Hooks see it, and change nothing of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lorameter.trial.building import lora


def see_wanted(model: torch.nn.Module, step: Callable[[], object]) -> dict[str, bool | None]:
    """Take the step; the modules that it calls by their names in transformers' model, and whether a gradient is wanted
    for the first input of each, as its first call showed it; None where that is no tensor."""
    seen: dict[str, bool | None] = {}

    def look(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def see(_: Any, args: tuple[Any, ...]) -> None:
            seen.setdefault(name, args[0].requires_grad if args and isinstance(args[0], torch.Tensor) else None)

        return see

    hooks = [part.register_forward_pre_hook(look(name)) for name, part in lora.wrapped(model).named_modules()]
    try:
        step()
    finally:
        for hook in hooks:
            hook.remove()
    return seen
