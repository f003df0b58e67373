"""Several adapters on one base in requests: what they are called, which one answers, and who answers for which row.

A server of many adapters has two ways. It switches: one adapter is active, and PEFT's `set_adapter` walks over all
layers to have another. Or it mixes: each row of a batch names its adapter, and every adapted layer takes its rows apart
(`adapter_names`). Both need nothing but adapters of one kind, so the others have random weights.
"""

from __future__ import annotations

import time
from typing import Any

from lorameter.studies.variant import Variant
from lorameter.trial.building import lora

_APART = 1_009
"""Between the seeds of two replicates, of which no adapters are the same: more than a base may have."""


class Adapters:
    """The trained adapter of a model and further ones. Raises what PEFT raises if it cannot attach them."""

    def __init__(self, model: Any, variant: Variant, *, trained: str, count: int, seed: int) -> None:
        """Attach those that are missing of `count`; the trained one stays active."""
        self._model = model
        self.names = (trained, *(f"{trained}-beside{number}" for number in range(1, count)))
        """The trained one first."""
        for number, name in enumerate(self.names[1:], start=1):
            lora.attach_drawn(model, variant, name, seed * _APART + number)
        model.eval()  # the dropout of what PEFT adds is in train mode, whatever the model is in

    @property
    def trained(self) -> str:
        """The name of the trained one."""
        return self.names[0]

    def other(self, number: int) -> str:
        """The adapter to switch to in request `number`: all but the trained one in turn."""
        return self.names[1 + number % (len(self.names) - 1)]

    def rows(self, number: int, count: int) -> list[str]:
        """The adapter of each of `count` rows in request `number`: one after the other, with another one first each
        time. So a batch has as many different ones as it can, and over the requests all of them."""
        return [self.names[(number + row) % len(self.names)] for row in range(count)]

    def switch(self, name: str) -> float:
        """Have this adapter answer. Returns the seconds that it took: all of them on the host."""
        begin = time.perf_counter()
        self._model.set_adapter(name)
        return time.perf_counter() - begin

    def detach(self) -> None:
        """Leave the trained one alone on the base, and active."""
        lora.activate(self._model, self.trained)
        for name in self.names[1:]:
            lora.detach(self._model, name)
        self.names = self.names[:1]
