"""Which blocks of a model were computed again for the backward pass, and how much of each.

A module that is called while the autograd engine runs is being recomputed. Each call of a block to which a gradient
comes back has to be matched: a block that is recomputed in half of the micro-batches keeps the activations of the
others. What is matched may be a part of the block, such as its feed-forward layer: then a part of it is recomputed, and
that is said. How often it was is told by the module in it that was recomputed most: a recomputation may end before the
last module of a block, when everything that was to be saved is there again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from kernels_check.observe.blocks import block_names, block_of, lists_inside
from kernels_check.observe.calls import Calls


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRecomputed:
    """One block to which gradients came back."""

    name: str
    calls: int
    """Calls of the forward pass that a gradient comes back to."""
    again: int
    """How many of them were computed again."""
    modules: int
    """Modules inside the block that ran in them; itself where there are none."""
    repeated: int
    """How many of those were called again."""
    split: tuple[str, ...] = ()
    """Repeated members of the block of which others were computed again and these were not."""

    @property
    def whole(self) -> bool:
        """Whether each of its calls was computed again, be it in part."""
        return self.again >= self.calls and not self.split


def recomputed_blocks(model: nn.Module, calls: Calls) -> tuple[BlockRecomputed, ...]:
    """Every block that was called and to which a gradient comes back."""
    names = block_names(model)
    seen = _Sorted(frozenset(names))
    for number in calls.forward:
        seen.note_forward(calls, number)
    for number in sorted(calls.relevant.difference(calls.forward)):
        seen.note_again(calls, number)
    return tuple(seen.judge(name, lists_inside(model, name)) for name in names if seen.needing(name))


def ran_without_gradient(model: nn.Module, calls: Calls, judged: Iterable[BlockRecomputed]) -> tuple[str, ...]:
    """Blocks that ran and are none of ``recomputed_blocks``: there is nothing to recompute in them.

    A block whose ``forward`` is called directly, as in SqueezeBERT, calls no hook: the modules in it tell that it ran.
    """
    known = {block.name for block in judged}
    names = block_names(model)
    ran = {block_of(name, frozenset(names)) for number in calls.forward for name in calls.all[number].names}
    return tuple(name for name in names if name in ran and name not in known)


@dataclass(slots=True)
class _Sorted:
    """The calls of a step by the block and by the module in it."""

    blocks: frozenset[str]
    around: dict[int, int] = field(default_factory=dict)
    """The call of a block that each call lies in."""
    inside: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """By block and module, the calls of the block that its calls of the forward pass lie in."""
    again: dict[str, dict[str, int]] = field(default_factory=dict)
    """By block and module, its calls in the backward pass."""

    def note_forward(self, calls: Calls, number: int) -> None:
        call = calls.all[number]
        block, name = self._place(call.names)
        if block is None:
            return
        if name == block:
            self.around[number] = number
        elif call.caller in self.around:
            self.around[number] = self.around[call.caller]
        else:  # the block itself calls no hook: each call stands for one of the block
            self.around[number] = number
        if self.around[number] in calls.differentiable:
            self.inside.setdefault(block, {}).setdefault(name, []).append(self.around[number])

    def note_again(self, calls: Calls, number: int) -> None:
        block, name = self._place(calls.all[number].names)
        if block is not None:
            counts = self.again.setdefault(block, {})
            counts[name] = counts.get(name, 0) + 1

    def needing(self, block: str) -> int:
        """Calls of a block that a gradient comes back to; of one that calls no hook, those of its busiest module."""
        modules = self.inside.get(block, {})
        return len(set(modules.get(block, ()))) or max((len(set(found)) for found in modules.values()), default=0)

    def judge(self, block: str, members: Iterable[Sequence[str]]) -> BlockRecomputed:
        modules, again = self.inside[block], self.again.get(block, {})
        matched = 0
        for name, within in modules.items():
            covered = len(set(within))
            matched = max(matched, again.get(name, 0) * covered // len(within))
        inside = {name: within for name, within in modules.items() if name != block} or modules
        repeated = {name for name, within in inside.items() if again.get(name, 0) >= len(within)}
        return BlockRecomputed(
            name=block,
            calls=self.needing(block),
            again=min(matched, self.needing(block)),
            modules=len(inside),
            repeated=len(repeated),
            split=tuple(one for group in members for one in self._left_out(group, modules, repeated)),
        )

    def _left_out(self, group: Sequence[str], modules: Iterable[str], repeated: Iterable[str]) -> list[str]:
        def any_in(names: Iterable[str], member: str) -> bool:
            return any(block_of(name, frozenset({member})) for name in names)

        ran = [member for member in group if any_in(modules, member)]
        left = [member for member in ran if not any_in(repeated, member)]
        return left if len(left) < len(ran) else []

    def _place(self, names: Sequence[str]) -> tuple[str | None, str]:
        for name in names:
            block = block_of(name, self.blocks)
            if block is not None:
                return block, name
        return None, names[0]
