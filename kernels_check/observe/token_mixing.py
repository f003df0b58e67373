"""Whether a module lets one token see another: some tokens are changed, and the others looked at.

Attention that is written out in operations of single elements leaves no operator that tells. What it does tells: a
module that mixes tokens changes what it returns for tokens whose own input is as it was. So the step's call of the
model is made once more, and each module in question is called again at its place, with every second position changed,
with the others, and with either half: whichever way attention runs, and however far, one of them reaches beyond itself.
Equality is exact, as each row of a matrix product depends on its own input only.

Convolutions, recurrences, poolings and norms over tokens mix them, too, and are no attention: they are told by their
functions, and give what they gave before while tokens are changed. Which dimension has the features is not known, so a
module that keeps every channel for itself passes for one that keeps its tokens apart. What cannot be asked counts as
mixing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from kernels_check.observe.compilations import compiler_held
from kernels_check.observe.forwards import Forwards, by_row, fresh, is_sharded
from kernels_check.observe.inputs import ModelCall, training_calls
from kernels_check.observe.random_state import RandomState
from kernels_check.observe.restore import Modes

_KNOWN = frozenset({
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "lstm", "gru"),
    *("rnn_tanh", "rnn_relu", "batch_norm", "group_norm", "instance_norm", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
})  # fmt: skip
"""Functions of torch that mix tokens and are no attention."""


def mixing_modules(model: nn.Module, calls: Sequence[ModelCall], names: Collection[str]) -> frozenset[str]:
    """Those of some modules that mix tokens in the calls of a step, and those that could not be asked.

    Args:
        model: restored by the caller; modes and random numbers are left as found.
        calls: of the model, as the step made them.
        names: of its modules.
    """
    waiting, mixing = set(names), set[str]()
    modules = dict(model.named_modules(remove_duplicate=False))
    modes, state = Modes(model), RandomState()

    def ask(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if name in waiting and not asking:
            asking.append(name)
            try:
                if _Question(module, args, kwargs).mixes():
                    mixing.add(name)
                waiting.discard(name)
            finally:
                asking.clear()

    asking: list[str] = []
    try:
        for call in training_calls(calls) if not is_sharded(model) else ():
            if not waiting:
                break
            with ExitStack() as stack:
                for name in sorted(waiting):

                    def hook(module: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                        ask(name, module, args, kwargs)

                    stack.callback(modules[name].register_forward_hook(hook, with_kwargs=True).remove)
                stack.enter_context(compiler_held("force_eager"))
                stack.enter_context(by_row(model, call.training))
                Forwards(call).again()
    except Exception:  # of the model's own, called once more: nothing is known of those that are left
        return frozenset(mixing | waiting)
    finally:
        modes.restore()
        state.restore()
    return frozenset(mixing | waiting)


class _Question:
    """One call of a module, which can be made again with other tokens.

    Args:
        module: that was called.
        args: positional arguments.
        kwargs: arguments by name.
    """

    def __init__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._module = module
        self._leaves, self._structure = tree_flatten((args, kwargs))
        self._state = RandomState()
        self._known = _Known()

    def mixes(self) -> bool:
        """Whether a token sees another, however the dimensions are laid out; and if two calls alike differ."""
        tensors = [(place, leaf) for place, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor) and leaf.dim()]
        main = next((leaf for _, leaf in tensors if leaf.is_floating_point() and leaf.dim() > 1), None)
        main = tensors[0][1] if main is None and tensors else main
        if main is None:
            return False
        self._reference = self._called({}, anew=True)
        if _differ(self._called({}), self._reference):
            return True
        if not main.is_floating_point():
            return self._mixes_over(main, [(place, leaf) for place, leaf in tensors if leaf is main], None) is True
        if self._sees_beside(main, tensors):
            return True
        found = [self._mixes_over(main, tensors, features) for features in ((-1, 1) if main.dim() > 2 else (-1,))]
        known = [one for one in found if one is not None]
        return bool(known) and all(known)

    def _mixes_over(self, main: Tensor, tensors: Sequence[tuple[int, Tensor]], features: int | None) -> bool | None:
        """With one dimension for the features; None where nothing of those positions is returned."""
        positions = _positions(main, features)
        returned = [one for one in self._reference if _returns(one, positions, features)]
        if not returned:
            return None
        given = {
            place: leaf
            for place, leaf in tensors
            if leaf.dtype.is_floating_point is main.is_floating_point() and _positions(leaf, features) == positions
        }
        return any(self._reaches(mask, given, positions, features) for mask in _masks(positions, main.device))

    def _reaches(
        self, mask: Tensor, given: Mapping[int, Tensor], positions: Sequence[int], features: int | None
    ) -> bool:
        """Whether changing some positions reaches others."""
        changed = {place: _changed(leaf, mask, features) for place, leaf in given.items()}
        beyond = within = False
        for before, after in zip(self._reference, self._called(changed), strict=True):
            if _returns(before, positions, features):
                moved = _moved(before, after, -1 if features is None else features)
                beyond |= bool((moved & ~mask).any())
                within |= bool((moved & mask).any())
        return beyond and within

    def _sees_beside(self, main: Tensor, tensors: Sequence[tuple[int, Tensor]]) -> bool:
        """Whether it sees tokens of another sequence, as attention between two does."""
        for place, leaf in tensors:
            beside = leaf.is_floating_point() and leaf.dim() == main.dim() > 2 and leaf.shape[:-1] != main.shape[:-1]
            if beside and leaf.shape[-2] > 1:
                everywhere = torch.ones(leaf.shape[:-1], dtype=torch.bool, device=leaf.device)
                if _differ(self._called({place: _changed(leaf, everywhere, -1)}), self._reference):
                    return True
        return False

    def _called(self, changed: Mapping[int, Tensor], *, anew: bool = False) -> list[Tensor]:
        leaves = [
            changed.get(place, leaf.clone() if isinstance(leaf, Tensor) else fresh(leaf))
            for place, leaf in enumerate(self._leaves)
        ]
        args, kwargs = tree_unflatten(leaves, self._structure)
        self._state.restore()
        self._known.begin(anew=anew)
        with torch.no_grad(), self._known:
            output = self._module(*args, **kwargs)
        return [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]


class _Known(TorchFunctionMode):
    """Lets functions that are known to mix tokens give what they gave before."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[Any] = []
        self._rest: Iterator[Any] | None = None

    def begin(self, *, anew: bool) -> None:
        """A call begins; ``anew`` is the one that the later ones repeat."""
        self._rest = None if anew else iter(self._kept)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, or not."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in _KNOWN or (name.startswith("conv") and set(args[1].shape[2:]) == {1}):
            return func(*args, **kwargs)
        if self._rest is None:
            self._kept.append(func(*args, **kwargs))
            return tree_map_only(Tensor, Tensor.clone, self._kept[-1])
        return tree_map_only(Tensor, Tensor.clone, next(self._rest))


def _positions(tensor: Tensor, features: int | None) -> tuple[int, ...]:
    """The dimensions without that of the features, if there is one."""
    if features is None:
        return tuple(tensor.shape)
    return tuple(tensor.movedim(features, -1).shape[:-1]) if tensor.dim() > max(features, 0) else ()


def _returns(tensor: Tensor, positions: Sequence[int], features: int | None) -> bool:
    return _positions(tensor, -1 if features is None else features) == tuple(positions)


def _masks(positions: Sequence[int], device: torch.device) -> Iterator[Tensor]:
    """Every second position, the first half, and what each of the two leaves, along each dimension."""
    for dimension, size in enumerate(positions):
        places = torch.arange(size, device=device)
        for chosen in ((places % 2).bool(), places < (size + 1) // 2) if size > 1 else ():
            shape = [-1 if one == dimension else 1 for one in range(len(positions))]
            yield from (one.view(shape).expand(*positions) for one in (~chosen, chosen))


def _changed(leaf: Tensor, mask: Tensor, features: int | None) -> Tensor:
    """Another tensor at some positions: noise of its own size, or other numbers of the same tensor."""
    if features is None:
        return torch.where(mask, leaf.flatten().roll(1).view_as(leaf), leaf)
    generator = torch.Generator(leaf.device).manual_seed(0)
    noise = torch.randn(leaf.shape, generator=generator, device=leaf.device) * (1 + leaf.detach().float().abs().mean())
    return torch.where(mask.unsqueeze(-1).movedim(-1, features), leaf + noise.to(leaf.dtype), leaf).detach()


def _moved(before: Tensor, after: Tensor, features: int) -> Tensor:
    """Which positions differ; two that are no number are alike."""
    return ((before != after) & ~(before.isnan() & after.isnan())).movedim(features, -1).any(dim=-1)


def _differ(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) != len(other) or any(
        left.shape != right.shape or bool(((left != right) & ~(left.isnan() & right.isnan())).any())
        for left, right in zip(one, other, strict=True)
    )
