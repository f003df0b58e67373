"""Which blocks of a model ran in code of torch.compile, and which ran eagerly.

Compiled code calls no hook, and its regions are entered in some call of a module, or outside all of them. A block whose
modules' hooks were called ran eagerly, unless a region was entered in it: then its code is compiled in pieces, and what
counts is whether any layer of weights, product or attention in it ran outside of them. A block that called no hook ran
in compiled code if a region was entered where it is called from, and it ran at all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from torch import nn

from kernels_check.observe.blocks import block_names, block_of
from kernels_check.observe.calls import Calls


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledBlocks:
    """The blocks that ran, sorted."""

    compiled: tuple[str, ...] = ()
    """All of it ran in compiled code."""
    partly: tuple[str, ...] = ()
    """Some of it did."""
    eager: tuple[str, ...] = ()
    regions: int = 0
    """Compiled regions of the model."""
    helpers: int = 0
    """Regions in which none of its blocks or other modules ran, as of a loss."""

    @property
    def ran(self) -> int:
        """How many blocks ran."""
        return len(self.compiled) + len(self.partly) + len(self.eager)

    @property
    def not_whole(self) -> tuple[str, ...]:
        """Blocks of which not all was compiled."""
        return (*self.partly, *self.eager)


def compiled_blocks(
    model: nn.Module, calls: Calls, regions: Collection[int | None], eager: Collection[int], gradients: Collection[str]
) -> CompiledBlocks:
    """Sort the blocks that ran in the forward pass.

    Args:
        model: the model.
        calls: of its modules, as far as they call hooks.
        regions: for each compiled region that was entered in the forward pass, the call that it was entered in.
        eager: calls in which products or attention ran outside of any region.
        gradients: names of the parameters that a gradient reached.
    """
    return _CompiledSearch(
        model, calls, [one for one in regions if one is None or one in calls.relevant], eager, gradients
    ).sort()


@dataclass(slots=True)
class _CompiledSearch:
    model: nn.Module
    calls: Calls
    regions: list[int | None]
    eager: Collection[int]
    gradients: Collection[str]
    covered: set[int] = field(default_factory=set)
    """Calls with a region in them, at any depth."""
    inner: set[int] = field(default_factory=set)
    """Calls that called another module."""

    def sort(self) -> CompiledBlocks:
        names = block_names(self.model)
        blocks = frozenset(names)
        for region in self.regions:
            self.covered.update(self.calls.enclosing(region))
        fired: dict[str, list[int]] = {}
        for number in self.calls.forward:
            caller = self.calls.all[number].caller
            if caller is not None:
                self.inner.add(caller)
            block = self._block(number, blocks)
            if block is not None:
                fired.setdefault(block, []).append(number)
        compiled, partly, eager = set[str](), set[str](), set[str]()
        for block, numbers in fired.items():
            outside = any(self._is_eager(number) for number in numbers)
            if self.covered.isdisjoint(numbers):
                eager.add(block)
            else:
                (partly if outside else compiled).add(block)
        silent = [block for block in names if block not in fired]
        proven = {block for block in silent if self._reached(block) and self._region_around(block)}
        compiled |= proven
        for block in silent:
            frozen = block not in proven and not self._trains(block)
            beside = {other for other in fired if _parent(other) == _parent(block)}
            if frozen and self._region_around(block) and beside <= compiled:
                compiled.add(block)
        ours = sum(self._is_ours(region, blocks, proven=bool(compiled.difference(fired))) for region in self.regions)
        return CompiledBlocks(
            compiled=tuple(name for name in names if name in compiled),
            partly=tuple(name for name in names if name in partly),
            eager=tuple(name for name in names if name in eager),
            regions=ours,
            helpers=len(self.regions) - ours,
        )

    def _block(self, number: int, blocks: frozenset[str]) -> str | None:
        found = (block_of(name, blocks) for name in self.calls.all[number].names)
        return next((block for block in found if block is not None), None)

    def _is_eager(self, number: int) -> bool:
        """Whether a layer of weights, a product or attention ran in this call itself outside of any region."""
        if number in self.eager:
            return True
        if number in self.covered or number in self.inner:
            return False
        return bool(self.model.get_submodule(self.calls.all[number].name)._parameters)

    def _reached(self, block: str) -> bool:
        return any(block_of(name, frozenset({block})) is not None for name in self.gradients)

    def _trains(self, block: str) -> bool:
        return any(parameter.requires_grad for parameter in self.model.get_submodule(block).parameters())

    def _region_around(self, block: str) -> bool:
        """Whether a region was entered directly in the innermost call that a silent block can have been called from."""
        for name in _ancestors(block):
            numbers = self.calls.called(name)
            if numbers:
                return any(number in numbers for number in self.regions)
        return None in self.regions

    def _is_ours(self, region: int | None, blocks: frozenset[str], *, proven: bool) -> bool:
        """Whether a region is of the model; what holds the blocks may call helpers, such as a loss."""
        if proven:
            return True
        if region is None:
            return False
        if self._block(region, blocks) is not None:
            return True
        return not any(_holds(name, blocks) for name in self.calls.all[region].names)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _ancestors(name: str) -> Iterator[str]:
    while name:
        name = _parent(name)
        yield name


def _holds(name: str, blocks: Collection[str]) -> bool:
    return not name or any(block.startswith(f"{name}.") for block in blocks)
