"""Which calls of modules ended in an exception and came to nothing.

A pass that runs out of memory, or out of patience, is taken again by a program that catches the error: what it called
is no part of the step. But a program may also leave a forward by an exception and train on what it has kept of it, as
those do that read activations and need no more layers. So a call counts all the same where a gradient came back to
anything that was returned inside it. What the backward pass computes again is left by an exception as a rule, and is
none of these.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from kernels_check.observe.safe_hooks import HookGuard

Output = tuple[int, "weakref.ref[Tensor]"]
"""A tensor that a gradient can come back to, with the number of the call that returned it."""


@dataclass(slots=True)
class BrokenCalls:
    """Calls that raised, and those that a gradient came back to in spite of it."""

    shield: HookGuard
    """What hooks are wrapped in."""
    raised: set[int] = field(default_factory=set)
    _used: set[int] = field(default_factory=set)
    _hooks: ExitStack = field(default_factory=ExitStack)

    def add(self, number: int, outputs: Iterable[Output]) -> None:
        """Note a call that raised, and ask what was returned inside it for gradients.

        Args:
            number: of the call.
            outputs: of the calls inside it.
        """
        self.raised.add(number)
        for inner, reference in outputs:
            tensor = reference()
            if tensor is not None:  # what nobody holds any more can only have been a step to what somebody holds
                self._hooks.push(tensor.register_hook(self.shield(partial(self._come_back, inner))))

    def close(self) -> None:
        """Take the hooks off."""
        self._hooks.close()

    def failed(self, callers: Mapping[int, int | None]) -> frozenset[int]:
        """Numbers of all calls that came to nothing: those that raised, and those inside them.

        Args:
            callers: the caller of each call, by their numbers.
        """
        used = {around for number in self._used for around in _around(number, callers)}
        gone = self.raised - used
        if not gone:
            return frozenset()
        return frozenset(number for number in callers if not gone.isdisjoint(_around(number, callers)))

    def _come_back(self, number: int, gradient: Tensor) -> None:
        self._used.add(number)


def outputs_of(number: int, output: Any) -> Iterator[Output]:
    """The tensors of an output that a gradient can come back to."""
    if isinstance(output, Tensor):
        if output.requires_grad:
            yield number, weakref.ref(output)
    elif isinstance(output, Mapping):
        for one in output.values():
            yield from outputs_of(number, one)
    elif isinstance(output, list | tuple):
        for one in output:
            yield from outputs_of(number, one)
    elif hasattr(output, "__dict__"):
        for one in vars(output).values():
            if isinstance(one, Tensor):
                yield from outputs_of(number, one)


def _around(number: int | None, callers: Mapping[int, int | None]) -> Iterator[int]:
    while number is not None:
        yield number
        number = callers[number]
