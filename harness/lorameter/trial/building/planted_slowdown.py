"""A slow-down of known cause: real extra work in every adapted layer, to see what a protocol can see.

The work is a float32 matrix product in the layer's forward pass; its result is thrown away, so losses stay what they
were. It takes the path that a real regression takes (one more kernel in a layer's forward), which a `sleep` would not.
The factors are narrow: one as wide as the layer would have to be read from memory each time, and a small slow-down
could not be injected.
"""

from __future__ import annotations

from typing import Any

import torch

from lorameter.trial.building.peft_methods import adapted_layers

WIDTH = 64
"""Inner size of the product: 16 KiB in float32, which stays in the first cache."""


def inject_work(model: torch.nn.Module, rows: int) -> int:
    """Add a product of (rows, 64) and (64, 64) to every adapted layer's forward; returns the layers changed."""
    layers = adapted_layers(model)
    extra = _Extra(rows)
    for layer in layers.values():
        layer.register_forward_pre_hook(extra)
    return len(layers)


class _Extra:
    """A forward hook that multiplies two constant matrices on the input's device."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._factors: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, module: Any, inputs: Any) -> None:
        if self._factors is None:
            device = inputs[0].device
            self._factors = (
                torch.ones(self._rows, WIDTH, device=device),
                torch.ones(WIDTH, WIDTH, device=device),
            )
        with torch.no_grad():
            torch.mm(*self._factors)
