"""The backward passes of a step, and which of them add up in the gradients that one update takes.

A step may go back several times for one update, as accumulation does; or once for each of several, for each evaluation
of a closure, or only to find a point from which to go back again. What tells them apart is what lies in the gradients
when a pass begins, and whether an update was between it and the one before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kernels_check.observe.gradients import largest
from kernels_check.observe.module_tree import every_parameter


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BackwardPass:
    """One run of the autograd engine."""

    task: int
    """Its number, as the engine gives it."""
    after_update: bool = False
    """Whether an optimizer of the model's parameters has stepped since the pass before."""
    in_update: bool = False
    """Whether one is stepping, as where it is given a closure."""
    lying: Sequence[Tensor] = ()
    """Largest magnitudes of what lay in the gradients as it began, left on their devices."""

    unread: bool = False
    """Whether something lay there that could not be read."""

    @property
    def anew(self) -> bool:
        """Whether nothing lay there."""
        return not any(float(size) != 0 for size in self.lying)


@dataclass(slots=True)
class BackwardPasses:
    """Notes the passes of a step.

    Args:
        model: whose gradients they write.
    """

    model: nn.Module
    _trained: dict[int, Tensor] = field(init=False)
    _last: BackwardPass | None = None
    _updated: bool = False
    _updating: int = 0

    def __post_init__(self) -> None:
        self._trained = {id(value): value for value in every_parameter(self.model) if value.requires_grad}

    def current(self) -> BackwardPass:
        """The pass that is under way; to be asked before it has written any gradient."""
        task = torch._C._current_graph_task_id()
        if self._last is None or self._last.task != task:
            with torch.no_grad():
                lying, unread = _sizes([value.grad for value in self._trained.values()])
            self._last = BackwardPass(
                task=task, after_update=self._updated, in_update=self._updating > 0, lying=lying, unread=unread
            )
            self._updated = False
        return self._last

    def update_begins(self, optimizer: Any) -> None:
        """An optimizer is about to step; those of other models are none of this one's."""
        self._updating += self._is_ours(optimizer)

    def update_ends(self, optimizer: Any) -> None:
        """It has stepped."""
        if self._is_ours(optimizer):
            self._updating, self._updated = max(self._updating - 1, 0), True

    def _is_ours(self, optimizer: Any) -> bool:
        return any(id(value) in self._trained for group in optimizer.param_groups for value in group["params"])


def sums_of(passes: Iterable[tuple[BackwardPass, bool]]) -> dict[BackwardPass, int] | str:
    """Which passes add up: the number of the sum that each belongs to; or why that is not told.

    Args:
        passes: in the order in which they began, each once, with whether it gave any gradient.
    """
    sums: dict[BackwardPass, int] = {}
    number, given = 0, False
    for one, gives in passes:
        if given:
            if one.unread:
                return "what lay in the gradients when a pass began could not be read"
            if one.anew and not one.after_update and not one.in_update:
                return (
                    "the gradients of an earlier pass were gone before the next, with no update between them: it is "
                    "not told which passes the update rests on"
                )
            if one.after_update and not one.anew:
                return "the gradients that an update had taken were still there when the next pass added to them"
            number, given = (number + 1, False) if one.anew else (number, given)
        sums[one] = number
        given = given or gives
    return sums


def _sizes(gradients: Iterable[Tensor | None]) -> tuple[list[Tensor], bool]:
    """How large each is that is there, and whether one could not be read."""
    found, unread = [], False
    for gradient in gradients:
        try:
            size = None if gradient is None else largest(gradient)
        except Exception:  # an exception here would be the step's
            unread = True
        else:
            found += [] if size is None else [size]
    return found, unread
