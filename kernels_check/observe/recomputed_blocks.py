"""Which blocks of a model were computed again for the backward pass, and how much of each.

A module that is called while the autograd engine runs is being recomputed. Each call of a block to which a gradient
comes back has to be matched: a block that is recomputed in half of the micro-batches keeps the activations of the
others. How often a block was recomputed is told by the module in it that was recomputed most: a recomputation may end
before the last module, when everything that was to be saved is there again. Every other module with a matrix must lie
in something that was recomputed as often: where the attention alone is, the feed-forward layer keeps its activations.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from kernels_check.observe.blocks import block_names, block_of
from kernels_check.observe.calls import Calls
from kernels_check.observe.module_tree import named_modules


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
    kept: tuple[str, ...] = ()
    """Parts of the block that were not computed again where others were: their activations were kept."""

    @property
    def whole(self) -> bool:
        """Whether all of it was computed again, at each of its calls."""
        return self.again >= self.calls and not self.kept


def recomputed_blocks(model: nn.Module, calls: Calls) -> tuple[BlockRecomputed, ...]:
    """Every block that was called and to which a gradient comes back."""
    names = block_names(model)
    seen = _Sorted(frozenset(names))
    for number in calls.forward:
        seen.note_forward(calls, number)
    for number in sorted(calls.relevant.difference(calls.forward)):
        seen.note_again(calls, number)
    matrices = {
        name
        for name, module in named_modules(model, remove_duplicate=False)
        if any(value is not None and value.dim() > 1 for value in module._parameters.values())
    }
    return tuple(seen.judge(name, matrices) for name in names if seen.needing(name))


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

    def judge(self, block: str, matrices: Collection[str]) -> BlockRecomputed:
        modules, again = self.inside[block], self.again.get(block, {})
        matched = 0
        for name, within in modules.items():
            covered = len(set(within))
            matched = max(matched, again.get(name, 0) * covered // len(within))
        inside = {name: within for name, within in modules.items() if name != block} or modules
        repeated = frozenset(name for name, within in modules.items() if again.get(name, 0) >= len(within))
        return BlockRecomputed(
            name=block,
            calls=self.needing(block),
            again=min(matched, self.needing(block)),
            modules=len(inside),
            repeated=len(repeated.intersection(inside)),
            kept=_kept(block, [name for name in inside if name in matrices], repeated),
        )

    def _place(self, names: Sequence[str]) -> tuple[str | None, str]:
        for name in names:
            block = block_of(name, self.blocks)
            if block is not None:
                return block, name
        return None, names[0]


def _kept(block: str, matrices: Sequence[str], repeated: frozenset[str]) -> tuple[str, ...]:
    """The outermost parts of a block in which nothing was computed again.

    Args:
        block: the block.
        matrices: its modules with a matrix of their own, in the order in which they were called.
        repeated: what was computed again at each of its calls.
    """
    left = [name for name in matrices if block_of(name, repeated) is None]
    if len(matrices) > 1 and left == list(matrices[-1:]):  # it saves nothing, so that the recomputation ended before it
        return ()
    begun = {".".join(parts[:end]) for parts in (name.split(".") for name in repeated) for end in range(len(parts) + 1)}
    outermost = dict[str, None]()
    for name in left:
        parts = name.split(".")
        places = (".".join(parts[:end]) for end in range(block.count(".") + 2 if block else 1, len(parts) + 1))
        outermost[next((place for place in places if place not in begun), name)] = None
    return tuple(outermost)
